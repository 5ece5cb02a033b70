# shellcheck shell=bash

# run_to_its_end WATCHER HEARD COMMAND...: runs the command, and returns its exit code. The watcher (: for none) runs
# beside it, and is given its process number. A signal that means something to a job is not obeyed here: HEARD is called
# with its name and the process number, and hand_on passes it on.
run_to_its_end() {
  local child code=0 heard="$2" name never watcher="$1"
  shift 2
  "$@" &
  child=$!
  for name in HUP INT QUIT TERM USR1 USR2; do
    # shellcheck disable=SC2064
    trap "$heard $name $child" "$name"
  done
  if [ "$watcher" != : ]; then
    "$watcher" "$child" </dev/null >/dev/null 2>&1 &
    watcher=$!
  fi
  # Bash loses an exit code when a signal comes while it waits for it; so it is asked for when none can.
  exec {never}<> <(:)
  while kill -0 "$child" 2>/dev/null; do
    read -rt 0.5 -u "$never" || :
  done
  exec {never}<&-
  trap '' HUP INT QUIT TERM USR1 USR2 # late ones would change the exit code
  wait "$child" || code=$?
  [ "$watcher" = : ] || kill "$watcher" 2>/dev/null || :
  return "$code"
}

# hand_on NAME PROCESS: sends a signal to a process, if it is still there.
hand_on() {
  kill "-$1" "$2" 2>/dev/null || :
}
