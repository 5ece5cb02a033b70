#!/usr/bin/env bash
# Sets everything up in .venv of this clone: ./launch/setup.sh --help
# This finds a Python; the rest is launch.install.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints why an interpreter cannot be used; nothing if it can.
unfit() {
  "$1" -E - 2>/dev/null <<'PY' || echo "it cannot be run"
import sys
if sys.version_info < (3, 11):
    print("it is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("it has no venv and ensurepip (Debian, Ubuntu: apt-get install python%d.%d-venv)" % sys.version_info[:2])
PY
}

refused=""
for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.14}; do
  command -v "$candidate" >/dev/null || continue
  reason="$(unfit "$candidate")"
  [ -z "$reason" ] && exec "$candidate" -E -m launch.install "$@"
  refused+="  $(command -v "$candidate"): $reason"$'\n'
done
cat >&2 <<EOT
setup: Python 3.11 or newer, with venv, is needed; none was found.
${refused}Install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; a cluster: module load python),
or name it: PYTHON=/path/to/python3.12 $0
EOT
exit 1
