"""The flags of a run, how they are parsed, and the plan that follows from them.

Importing this package loads neither torch nor NumPy.
"""

from __future__ import annotations

from lars.config.config import Config
from lars.config.flags import parse
from lars.errors import UsageError

__all__ = ["Config", "UsageError", "parse"]
