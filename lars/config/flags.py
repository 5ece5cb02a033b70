"""Parsing of a command line into dataclass objects: every field is a flag, and every flag is a field.

The module imports little, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import signal
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from lars import launcher
from lars.config import recipes
from lars.config.recipes import Word
from lars.errors import UsageError


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Iterable[str] = (),
    aliases: Sequence[str] = (),
    same_run: bool = True,
    repeatable: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Make a dataclass field that is a command-line flag.

    Args:
        default: Value if the flag is not given. A bool with the default True is switched off with ``--no-...``.
        help: One or two sentences for ``--help``.
        group: Heading under which ``--help`` lists the flag.
        choices: Accepted values, if they are few.
        aliases: Other spellings of the flag.
        same_run: Whether the value must stay the same when a run is resumed.
        repeatable: Whether the values add up if the flag of a tuple is repeated. Otherwise the last one counts.
        at_least: Smallest permitted number.
        above: The number must be larger than this.
        below: The number must be smaller than this.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": tuple(choices),
        "aliases": tuple(aliases),
        "same_run": same_run,
        "repeatable": repeatable,
        "at_least": at_least,
        "above": above,
        "below": below,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """``base_lr`` -> ``--base-lr``."""
    return "--" + field_name.replace("_", "-")


def check_ranges(flags: Any) -> None:
    """Check that every number in a dataclass object of flags is finite and in its range.

    Raises:
        UsageError: A number is out of range.
    """
    for field in dataclasses.fields(flags):
        at_least, above, below = (field.metadata[key] for key in ("at_least", "above", "below"))
        value, name = getattr(flags, field.name), flag_name(field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            if at_least is not None and not at_least <= number < math.inf:
                raise UsageError(f"{name} must be at least {at_least}, not {number}")
            if above is not None and not above < number < math.inf:
                raise UsageError(f"{name} must be more than {above}, not {number}")
            if below is not None and not number < below:
                raise UsageError(f"{name} must be below {below}, not {number}")


def parse(
    argv: Sequence[str] | None, *kinds: type, description: str, epilog: str = ""
) -> tuple[Any, ...]:
    """Parse a command line into one object of each dataclass in `kinds`.

    ``@FILE`` and ``--recipe NAME`` insert the flags of a recipe; see `lars.config.recipes`. Later flags override
    earlier ones. ``--recipe list`` prints a table of the recipes and exits. After an error the program exits with code
    2 and a message that names the flag.

    Args:
        argv: Words of the command line without the program's name. None means sys.argv.
        kinds: Dataclasses whose fields are the flags. Field names must be unique.
        description: Text at the start of ``--help``.
        epilog: Text at the end of ``--help``, such as examples.
    """
    parser = _parser(kinds, description=description, epilog=epilog)
    argv = sys.argv[1:] if argv is None else argv
    if recipes.asks_for_list(argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends the program silently
        launcher.announce(recipes.table(parser.error))
        parser.exit()
    words = list(recipes.expand(argv, parser.error))
    values = vars(parser.parse_words(words))
    # A parser without defaults returns only the flags that were given.
    silent = _parser(kinds, argument_default=argparse.SUPPRESS)
    given = vars(silent.parse_words(words))
    typed = vars(silent.parse_words([word for word in words if not word.place]))
    try:
        return tuple(
            _object(kind, {f.name: values[f.name] for f in dataclasses.fields(kind)}, given, typed)
            for kind in kinds
        )
    except ValueError as error:
        parser.error(str(error))


def _object(
    kind: type, values: dict[str, Any], given: dict[str, Any], typed: dict[str, Any]
) -> Any:
    """Build an object of a dataclass. The class may adapt its values to the flags that were given."""
    if hasattr(kind, "resolved"):
        values = kind.resolved(values, given, typed)
    return kind(**values)


def _parser(kinds: Sequence[type], **options: Any) -> _FlagParser:
    """Build a parser for the flags of these dataclasses."""
    parser = _FlagParser(formatter_class=_HelpFormatter, allow_abbrev=False, **options)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="insert the flags of a recipe in launch/recipes/, as @FILE does for any file; list: show all recipes",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for kind in kinds:
        types_of = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            group = field.metadata.get("group", "data")
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            spellings = [flag_name(field.name), *field.metadata.get("aliases", ())]
            argument = _argument(field, types_of[field.name])
            if "argument_default" in options:
                argument["default"] = options["argument_default"]
            groups[group].add_argument(*spellings, **argument)
    return parser


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Keyword arguments of add_argument for one field."""
    options: dict[str, Any] = {
        "default": field.default,
        "help": field.metadata["help"],
        "dest": field.name,
    }
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        return options
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        members = get_args(hint)
        hint = members[0]
        options |= {
            "nargs": "+" if members[-1] is Ellipsis else len(members),
            "action": _ExtendTuple if field.metadata.get("repeatable") else _StoreTuple,
        }
    if field.metadata.get("choices"):
        options["choices"] = field.metadata["choices"]
    else:
        options["metavar"] = {int: "N", float: "X"}.get(hint, "TEXT")
        if field.name.endswith("_dir"):
            options["metavar"] = "DIR"
    return options | {"type": _text if hint is str else hint}


def _text(word: str) -> str:
    """A value that is text. An empty one usually comes from an unset variable of the shell."""
    if not word:
        raise argparse.ArgumentTypeError("the value is empty; give one, or leave the flag out")
    return word


class _StoreTuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


class _ExtendTuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        earlier = getattr(namespace, self.dest, None) or ()
        setattr(namespace, self.dest, (*earlier, *values))


class _FlagParser(argparse.ArgumentParser):
    def parse_words(self, words: Sequence[Word]) -> argparse.Namespace:
        """Parse a command line after its recipes have been expanded."""
        values, unknown = self.parse_known_args([word.text for word in words])
        if unknown:
            place = next(word.place for word in words if word.text == unknown[0])
            self.error(f"{place}{self._explain(unknown[0])}")
        return values

    def _explain(self, word: str) -> str:
        """Describe what is wrong with an unknown word, and suggest a correction."""
        name = word.partition("=")[0]
        if name.startswith("--"):
            known = difflib.get_close_matches(name, self._option_string_actions, n=1)
            return f"{name} is not a flag" + (f"; did you mean {known[0]}?" if known else "")
        if word.endswith(".args") or Path(word).is_file():
            return f"{word} does not belong to a flag; did you mean @{word}?"
        if word.lower() in ("true", "false", "0", "1", "yes", "no"):
            return (
                f"{word} does not belong to a flag; switches take no value: use --flag or --no-flag"
            )
        return f"{word} does not belong to a flag"

    def print_help(self, file: Any = None) -> None:
        if launcher.rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Report the error in one line. The usage is left out because it is longer than a screen."""
        launcher.wait_to_report(UsageError.exit_code, met=False)
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message} (--help lists all flags)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        default = action.default
        if (
            default in (None, ())
            or (isinstance(default, bool) and not default)
            or default == argparse.SUPPRESS
        ):
            return text
        if "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{text} (default: {shown})".replace("%", "%%")
