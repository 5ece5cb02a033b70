"""Every way in which a job ends early, with the exit code that its launcher sees.

Exit code 3 belongs to the data (`data.DataError`); any error without a code of its own exits with 1.
"""

from __future__ import annotations

EXIT_STALLED = 6
EXIT_LOST_PEER = 7


class UsageError(ValueError):
    """A flag, or a combination of flags, that cannot be used; the message names the flag and the fix."""

    exit_code = 2


class CheckpointError(RuntimeError):
    """No checkpoint can be used or written; the message says what was tried and what to do."""

    exit_code = 4


class NonFiniteError(RuntimeError):
    """Training has broken down: too many steps in a row were not finite."""

    exit_code = 5


class Preempted(Exception):
    """The job was asked to stop, and nothing is lost; the same command resumes it.

    Attributes:
        received: Name of the signal that this rank received, if any.
        on_all_ranks: Whether every rank ends now, so that none has to end the others.
    """

    exit_code = 75

    def __init__(
        self, message: str, *, received: str | None = None, on_all_ranks: bool = False
    ) -> None:
        """Say what the next job starts from."""
        super().__init__(message)
        self.received, self.on_all_ranks = received, on_all_ranks
