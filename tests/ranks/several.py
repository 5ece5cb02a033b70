"""Run several scripts of this folder one after the other, which starts the ranks only once.

Arguments: scripts with their arguments, separated by "+". The scripts share the world, and each calls `start.join`.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run each script as a program."""
    words = sys.argv[1:]
    while words:
        end = words.index("+") if "+" in words else len(words)
        sys.argv = [str(Path(__file__).with_name(words[0])), *words[1:end]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        words = words[end + 1 :]


main()
