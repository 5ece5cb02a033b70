"""The list of images to exclude (``--exclude``), as ``python -m data.check`` writes it."""

from __future__ import annotations

from data import DataError


def refuse_none_left(left: int, path: str | None, split: str) -> None:
    """Raise DataError if the list leaves out every image of a split.

    Args:
        left: Number of images that are left.
        path: The list.
        split: ``train``, ``val`` or ``validation``.
    """
    if not left:
        raise DataError(f"--exclude: {path} leaves out every image of {split}")


def read_excluded(path: str | None, split: str) -> frozenset[str]:
    """Return the samples of a split to leave out.

    A line is ``train/<class>/<file>`` or ``val/<class>/<file>`` for folders, and
    ``train/<record file>#<number>`` or ``validation/<record file>#<number>`` for records. Empty
    lines and lines that begin with ``#`` are ignored.

    Args:
        path: The list; None for no list.
        split: ``train``, ``val`` or ``validation``.

    Raises:
        DataError: The list cannot be read, holds a line of another form, is empty, or has only
            lines for the other kind of data (folders instead of records, or the reverse).
    """
    if path is None:
        return frozenset()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise DataError(f"--exclude: {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line and not line.startswith(("#", "train/", "val/", "validation/")):
            raise DataError(
                f"--exclude: {path}, line {number}: {line!r} does not begin with train/, val/ or "
                "validation/; give a list that python -m data.check wrote"
            )
    if not any(lines):
        raise DataError(
            f"--exclude: {path} is empty; if there is nothing to exclude, python -m data.check "
            "writes the line # none"
        )
    splits = {line.split("/")[0] for line in lines if line and not line.startswith("#")}
    other = {"val": "validation", "validation": "val"}.get(split)
    if splits == {other}:
        raise DataError(
            f"--exclude: {path} has only lines of {other}/, which are for "
            f"{'folders' if other == 'val' else 'records'}; make a list by checking these images"
        )
    return frozenset(
        line.removeprefix(f"{split}/") for line in lines if line.startswith(f"{split}/")
    )
