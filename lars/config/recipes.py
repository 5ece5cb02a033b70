"""Recipes: files of flags. ``@FILE`` and ``--recipe NAME`` insert their flags into a command line.

A recipe may contain ``#`` comments and other recipes. Its comments ``# Result: ...`` and ``# Source: ...`` appear in
the table of ``--recipe list``.
"""

from __future__ import annotations

import codecs
import difflib
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

_PACKAGE = Path(__file__).resolve().parents[1]

# The folder of the training scripts and of launch/: the clone, or the copy in an installed package (see setup.py).
HOME = next(path for path in (_PACKAGE / "_scripts", _PACKAGE.parent) if path.is_dir())

# The recipes that have a name.
FOLDER = HOME / "launch" / "recipes"

# Ends the program with a message.
Fail = Callable[[str], NoReturn]


class Word(NamedTuple):
    """A word of the command line and its place in a recipe ("" if it was not in a recipe)."""

    text: str
    place: str = ""


def expand(
    words: Sequence[str], fail: Fail, *, folder: Path = Path(), within: tuple[Path, ...] = ()
) -> Iterator[Word]:
    """Replace ``@FILE`` and ``--recipe NAME`` by the words in the recipe.

    argparse could replace ``@FILE`` too, but it shows a traceback for an unreadable file.

    Args:
        words: The command line, or a line of a recipe.
        fail: Called with a message about a recipe that cannot be read.
        folder: Where a relative ``@FILE`` is looked for first, before the current directory.
        within: The recipes that are being read.
    """
    remaining = iter(words)
    for word in remaining:
        path = _recipe_path(word, remaining, folder, fail)
        if path is None:
            yield Word(word)
        elif path.resolve() in within:
            fail(f"{word} includes itself")
        else:
            for number, line in _read(path, word, fail):
                inner = (*within, path.resolve())
                for found in expand(line, fail, folder=path.parent, within=inner):
                    yield found if found.place else Word(found.text, f"{word}, line {number}: ")


def _recipe_path(word: str, remaining: Iterator[str], folder: Path, fail: Fail) -> Path | None:
    """The file of a recipe, or None for any other word. The name after ``--recipe`` is taken from `remaining`."""
    if word.startswith("@"):
        beside = folder / word[1:]
        return beside if beside.is_file() else Path(word[1:])
    flag, equals, name = word.partition("=")
    if flag != "--recipe":
        return None
    name = name if equals else next(remaining, "")
    known = names()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return fail(f"--recipe {name}: there is no such recipe; {hint}--recipe list shows all")


def _read(path: Path, word: str, fail: Fail) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line of a recipe; `word` is how the user called it."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except (OSError, ValueError) as error:
        hint = f"; did you mean --recipe {path.stem}?" if path.stem in names() else ""
        fail(f"{word} cannot be read: {getattr(error, 'strerror', error)}{hint}")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, shlex.split(line.decode(), comments=True)
        except ValueError as error:  # from shlex, or because the line is not UTF-8
            fail(f"{word}, line {number}: {error}")


def names() -> dict[str, Path]:
    """The file of each recipe that has a name."""
    found = sorted(FOLDER.glob("*.args"), key=lambda path: _natural(path.stem))
    return {path.stem: path for path in found}


def _natural(name: str) -> list[str]:
    """A sorting key that puts 8192 before 16384."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def asks_for_list(words: Sequence[str]) -> bool:
    """Whether a command line contains ``--recipe list``."""
    return "--recipe=list" in words or ("--recipe", "list") in itertools.pairwise(words)


def table(fail: Fail) -> str:
    """All recipes with their main flags, result and source."""
    head = ("recipe", "batch", "optimizer", "epochs", "val top-1", "source")
    rows = [head, *(_row(name, path, fail) for name, path in names().items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [
        "  ".join(
            [*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]
        )
        for row in rows
    ]
    return "\n".join(
        [*lines, "", "--recipe NAME inserts a recipe. Its file in launch/recipes/ has details."]
    )


def _row(name: str, path: Path, fail: Fail) -> tuple[str, ...]:
    words = [word.text for word in expand([f"@{path}"], fail)]
    flags = dict(itertools.pairwise([*words, ""]))  # the last value of each flag
    optimizer = flags.get("--base-op", "sgd")
    form = flags.get("--lars-form") if optimizer == "lars" else None
    batch = flags.get("--effective-batch-size", "-")
    stated = dict(re.findall(r"^# (Result|Source): (.+)$", path.read_text(), re.MULTILINE))
    return (
        name,
        batch,
        f"{optimizer} ({form})" if form else optimizer,
        flags.get("--epochs", "90"),
        stated.get("Result", "-"),
        stated.get("Source", "-"),
    )
