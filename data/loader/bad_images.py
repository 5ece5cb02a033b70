"""What happens to images that cannot be read (``--on-bad-image``), and the record of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data import DataError, SetError

Sample = TypeVar("Sample")

_HINT = "to leave out such images, give --on-bad-image skip; python -m data.check finds all of them"


def read_by_policy(
    read: Callable[[int], Sample],
    index: int,
    total: int,
    on_bad_image: str,
    max_bad_images: int,
) -> tuple[Sample | None, list[str]]:
    """Read sample `index` of `total`, or apply the policy if it cannot be read.

    Args:
        read: Reads a sample by its number.
        index: Number of the sample.
        total: Number of samples.
        on_bad_image: ``error``: raise. ``skip``: leave the sample out. ``replace``: read the next
            sample that can be read instead.
        max_bad_images: Number of bad samples in a row after which ``replace`` gives up.

    Returns:
        The sample (None: leave it out), and a message for each sample that could not be read.

    Raises:
        SetError: The set as a whole is at fault; no policy applies to that.
        DataError: The policy is ``error``, more than `max_bad_images` samples in a row cannot be
            read, or none can be read at all.
    """
    problems: list[str] = []
    for candidate in range(index, index + total):
        try:
            return read(candidate % total), problems
        except SetError:
            raise
        except DataError as error:
            if on_bad_image == "error":
                raise DataError(f"{error}; {_HINT}") from error
            problems.append(str(error))
        if on_bad_image == "skip":
            return None, problems
        if len(problems) > max_bad_images:  # every sample is bad if a file system went away
            raise _too_many(max_bad_images, problems)
    raise DataError("no image can be read")


def _too_many(limit: int, problems: list[str]) -> DataError:
    return DataError(
        f"more than --max-bad-images {limit} images cannot be read; "
        f"find all of them with python -m data.check. The last: {problems[-1]}"
    )


class BadImages:
    """The messages about images that could not be read, each once, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.messages: list[str] = []
        self._limit = limit

    def add(self, problems: list[str]) -> None:
        """Record messages; raise DataError beyond the limit."""
        self.messages += [text for text in dict.fromkeys(problems) if text not in self.messages]
        if len(self.messages) > self._limit:
            raise _too_many(self._limit, problems)
