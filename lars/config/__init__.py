"""What a user can say about a run, and what it means here. Importing it loads neither torch nor NumPy."""

from __future__ import annotations

from lars.config.config import Config
from lars.config.flags import parse
from lars.errors import UsageError

__all__ = ["Config", "UsageError", "parse"]
