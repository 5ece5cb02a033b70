"""Objects that a user names as ``package.module:Name``: optimizers, observers and networks."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from lars.errors import UsageError


def is_import_path(text: str) -> bool:
    """Whether a text is an import path instead of one of the names that a flag knows."""
    return ":" in text


def import_named(flag: str, path: str, is_wanted: Callable[[Any], bool] = callable) -> Any:
    """Import the object at ``package.module:Name``. The name may contain dots.

    A module is also found in the current folder, as with ``python -m``. The folder is searched last.

    Args:
        flag: The flag that has this value, for messages. Empty for an argument without a flag.
        path: The import path.
        is_wanted: Whether the flag accepts an object. It limits the suggestions for a misspelt name. The caller checks
            the result.

    Raises:
        UsageError: The path has another form, the module cannot be imported, or it has no such name.

    Example:
        import_named("--base-op", "torch.optim:SGD")  # torch.optim.SGD
    """
    where = f"{flag} {path}".strip()
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise UsageError(f"{where}: write package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise UsageError(
            f"{where}: the module {module_name} cannot be imported ({cause(error)}); install the package, correct the "
            "name, or start the command in the folder of the module"
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = getattr(found, "__dict__", {})  # a number has none
            known = [key for key, value in own.items() if is_wanted(value)]
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {module_name}:{near[0]}?" if near else "correct the name"
            raise UsageError(f"{where}: {module_name} has no {name}; {hint}")
        found = getattr(found, part)
    return found


def cause(error: Exception) -> str:
    """The type and the first line of the message of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
