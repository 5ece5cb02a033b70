#!/usr/bin/env bash
# Sets everything up in .venv of this clone: ./launch/setup.sh --help
# This script finds a Python interpreter; launch/install does the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints why an interpreter cannot be used, or nothing if it can.
unfit() {
  "$1" -E - 2>/dev/null <<'PY' || echo "it cannot be run"
import sys
if sys.version_info < (3, 11):
    print("it is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("it lacks venv or ensurepip (Debian, Ubuntu: apt-get install python%d.%d-venv)" % sys.version_info[:2])
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
setup: found no Python 3.11 or newer with venv.
${refused}Install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; on a cluster: module load python),
or say where it is: PYTHON=/path/to/python3.12 $0
EOT
exit 1
