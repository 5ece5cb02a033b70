#!/usr/bin/env bash
# Sets everything up, then runs all checks and tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

usage() {
  cat <<'EOF'
usage: launch/test.sh [PYTEST ARGUMENTS]

Sets everything up (launch/setup.sh --dev --dali), then runs ruff, mypy and pytest. Examples:

  launch/test.sh            all checks and tests, except those that take many minutes
  launch/test.sh -k resume  the tests whose names contain "resume"
  launch/test.sh -x         stop at the first test that fails
  launch/test.sh -m soak    the tests that take many minutes
  launch/test.sh -n 0       one test at a time, as --pdb needs it (2 at a time by default)
EOF
}

case "${1:-}" in
  -h | --help) usage && exit ;;
esac
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
# Two tests at a time, because tests mostly wait for processes. The tests of a file share their fixtures.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" check pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
code=$?
if [ -n "$failed" ]; then
  echo "test.sh: failed:$failed" >&2
  [ $code -ne 0 ] || code=1
fi
exit $code
