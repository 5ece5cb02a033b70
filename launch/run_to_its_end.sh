# shellcheck shell=bash

# run_to_its_end WATCHER HANDLER COMMAND...: runs the command and returns its exit code. WATCHER (: for none) is a
# function that runs at the same time, with the process number of the command as its argument. HANDLER is a function that
# is called for each signal, with the name of the signal and the process number of the command. forward_signal is one.
run_to_its_end() {
  local child code=0 handler="$2" name never watcher="$1"
  shift 2
  "$@" &
  child=$!
  for name in HUP INT QUIT TERM USR1 USR2; do
    # shellcheck disable=SC2064
    trap "$handler $name $child" "$name"
  done
  if [ "$watcher" != : ]; then
    "$watcher" "$child" </dev/null >/dev/null 2>&1 &
    watcher=$!
  fi
  # If a signal arrives while bash waits for a process, bash loses the exit code. So poll here, and wait once no signal
  # can arrive any more.
  exec {never}<> <(:)
  while kill -0 "$child" 2>/dev/null; do
    read -rt 0.5 -u "$never" || :
  done
  exec {never}<&-
  trap '' HUP INT QUIT TERM USR1 USR2 # a late signal would change the exit code
  wait "$child" || code=$?
  [ "$watcher" = : ] || kill "$watcher" 2>/dev/null || :
  return "$code"
}

# forward_signal NAME PROCESS: sends a signal to a process, if it still exists.
forward_signal() {
  kill "-$1" "$2" 2>/dev/null || :
}
