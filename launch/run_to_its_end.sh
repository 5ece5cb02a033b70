# shellcheck shell=bash

# run_to_its_end WATCHER COMMAND...: runs the command, hands the signals that mean something to a job on to it, and
# returns its exit code. The watcher (: for none) runs beside it, and is given its process number.
run_to_its_end() {
  local child code=0 name noticed=1 watcher="$1"
  shift
  "$@" &
  child=$!
  "$watcher" "$child" </dev/null >/dev/null 2>&1 &
  watcher=$!
  for name in INT TERM USR1 USR2; do
    # shellcheck disable=SC2064
    trap "noticed=1; kill -$name $child 2>/dev/null || :" "$name"
  done
  while [ -n "$noticed" ]; do # a signal ends bash's wait, not the child
    noticed=""
    wait "$child" && code=0 || code=$?
  done
  trap - INT TERM USR1 USR2
  kill "$watcher" 2>/dev/null || :
  return "$code"
}
