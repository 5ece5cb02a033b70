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
    """The job was asked to stop and has saved; the same command resumes it."""

    exit_code = 75
