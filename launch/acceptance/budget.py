"""What a part may use: time and a folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

# A part stops by itself this long before it would be ended.
_MARGIN = 0.1


@dataclass(frozen=True)
class Budget:
    """The limits of one part.

    Attributes:
        seconds: Time after which the part is ended.
        folder: A folder for its files, which is removed afterwards.
    """

    seconds: float
    folder: Path
    _began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that the part can still plan with."""
        return (1 - _MARGIN) * self.seconds - (time.monotonic() - self._began)
