#!/usr/bin/env bash
# Sets everything up and runs all checks and tests; arguments go to pytest (-k name, -x, -m soak).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
./launch/setup.sh --dev --dali || exit

python=.venv/bin/python
failed=""
check() {
  echo
  echo "test.sh: $*"
  "$python" -m "$@"
  local code=$?
  [ $code -eq 0 ] || failed+=" $1"
  return $code
}

check ruff check .
check ruff format --check .
check mypy
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" check pytest "$@"
code=$?
if [ -n "$failed" ]; then
  echo "test.sh: failed:$failed" >&2
  [ $code -ne 0 ] || code=1
fi
exit $code
