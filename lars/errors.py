"""Exceptions that end a job early, each with the exit code that the launcher sees.

Exit code 3 belongs to `data.DataError`. An error without its own code exits with 1.
"""

from __future__ import annotations

EXIT_STALLED = 6
EXIT_LOST_PEER = 7


class UsageError(ValueError):
    """A flag or a combination of flags is invalid. The message names the flag and the fix."""

    exit_code = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written. The message says what was tried and what to do."""

    exit_code = 4


class NonFiniteError(RuntimeError):
    """Training has diverged: too many consecutive steps had a non-finite loss or gradient."""

    exit_code = 5


class LostPeerError(RuntimeError):
    """Another rank has ended, or it cannot be reached."""

    exit_code = EXIT_LOST_PEER


class Preempted(BaseException):
    """The job stopped on request and lost no training. The same command resumes it.

    Attributes:
        received: Name of the signal that this rank received, if any.
        on_all_ranks: Whether all ranks stop at this point, so that no rank has to end the others.
    """

    exit_code = 75

    def __init__(
        self, message: str, *, received: str | None = None, on_all_ranks: bool = False
    ) -> None:
        """Create the exception; `message` says where the next job resumes."""
        super().__init__(message)
        self.received, self.on_all_ranks = received, on_all_ranks
