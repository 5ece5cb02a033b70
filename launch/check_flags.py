"""Reads the flags of a training script as the script does, without training: check_flags.py SCRIPT [FLAGS].

Exits with 2 and the script's message if a flag is wrong. Loads neither torch nor data.
"""

import runpy
import sys
import types
from pathlib import Path


def main() -> None:
    """Run the script with an engine that does nothing."""
    script = Path(sys.argv[1])
    engine = types.ModuleType("lars.engine")
    vars(engine)["train"] = lambda *_: None
    sys.modules[engine.__name__] = engine
    sys.argv = [script.name, *sys.argv[2:]]
    sys.path[:1] = [str(script.resolve().parent), str(Path(__file__).resolve().parents[1])]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
