"""Observers of the user: ``--observer package.module:Class``."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence

from lars.errors import UsageError
from lars.importing import import_named
from lars.learner.learner import StepResult
from lars.observe.observer import Observer, Training
from lars.observe.output import say

Kind = Callable[[Training], Observer]


def observers_at(places: Sequence[str]) -> list[Kind]:
    """Import the classes of custom observers.

    A module is also found in the current folder, as with ``python -m``.

    Args:
        places: The values of --observer, such as ``my_observers:Pager``.

    Raises:
        UsageError: A module cannot be imported, or it has no such observer.
    """
    return [_class_at(place) for place in places]


def _class_at(place: str) -> Kind:
    kind: Kind = import_named("--observer", place, _is_observer)
    if not _is_observer(kind):
        raise UsageError(f"--observer {place} is not a class derived from lars.observe.Observer")
    return lambda training: Guarded(place, kind, training)


def _is_observer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Observer)


class Guarded(Observer):
    """An observer of the user, whose errors do not end the training.

    An error at the start of a new run ends the job, because the user can fix it before time is spent. Later, and when
    a run is resumed, an error is printed and switches the observer off for the rest of the job.
    """

    def __init__(self, place: str, kind: Kind, training: Training) -> None:
        """Create the observer ``kind(training)``, which --observer has named `place`."""
        super().__init__(training)
        self.place = place
        self.member: Observer | None = None
        self._guarded(lambda: setattr(self, "member", kind(training)), may_end=True)

    def _guarded(self, call: Callable[[], object], *, may_end: bool = False) -> None:
        """Call a method of the observer.

        Args:
            call: Calls it.
            may_end: Whether an error ends the job if the run is new.

        Raises:
            UsageError: The observer of a new run failed at its start.
        """
        try:
            call()
        except Exception as error:  # code of the user raises anything
            self.member = None
            traceback.print_exc()
            cause = f"{type(error).__name__}: {error}"
            if may_end and self.training.loaded is None:
                raise UsageError(
                    f"--observer {self.place} failed at its start ({cause}); correct it, or leave it out"
                ) from error
            message = (
                f"--observer {self.place} failed and is switched off until the job ends ({cause})"
            )
            say(f"warning: {message}")
            self.training.progress.note(message)

    def start(self) -> None:
        if self.member is not None:
            self._guarded(self.member.start, may_end=True)

    def step(self, result: StepResult) -> None:
        if self.member is not None:
            member = self.member
            self._guarded(lambda: member.step(result))

    def validated(self) -> None:
        if self.member is not None:
            self._guarded(self.member.validated)

    def saved(self) -> None:
        if self.member is not None:
            self._guarded(self.member.saved)

    def end(self) -> None:
        if self.member is not None:
            self._guarded(self.member.end)
