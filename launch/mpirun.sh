#!/usr/bin/env bash
# Starts the ranks of a Python program with the mpirun of .venv, or with the one on the PATH if .venv has none.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'EOF'
usage: launch/mpirun.sh -np N [--hosts A:4,B:4 | --hostfile FILE] [--interface NAME] [--cpus-per-rank N]
                        [--dry-run] SCRIPT [ARGUMENTS]

  -np N              number of ranks
  --hosts LIST       hosts with their slots (default: this host)
  --hostfile FILE    the same as a file, in the format of the MPI (see launch/hostfile.example)
  --interface NAME   network between the hosts, such as eth0 or ib0, for MPI over TCP and for NCCL's sockets;
                     python -m launch.doctor suggests one. NCCL finds InfiniBand adapters without this option
  --cpus-per-rank N  bind each rank to N cores of its own, for its threads and decoding processes
                     (default: the ranks are not bound, and the kernel distributes them)
  --dry-run          print the command instead of running it

SCRIPT and everything after it go to python unchanged, so -m MODULE works too. If OMP_NUM_THREADS is not set, it
becomes the value of --cpus-per-rank, or else the CPUs of this machine divided by the number of ranks per host.
Variables that start with HOROVOD_, NCCL_, OMP_, MKL_, UCX_, FI_ or TORCH_ are passed to the ranks on all hosts.
If the output is a terminal, mpirun.sh sets LARS_TERMINAL to its width, and the trainer shows a progress bar.

On Ctrl-C, SIGTERM or a closed terminal, mpirun.sh sends SIGUSR1 to the ranks: the trainer saves a checkpoint and
exits with code 75. Other programs, and a trainer without SIGUSR1 in --stop-signals, end at once. A second signal, at
least two seconds after the first, always ends the ranks.

Example: train on a data set of handwritten digits, which needs no files, with two ranks
  launch/mpirun.sh -np 2 experiments/train_small.py --dataset digits --model resnet18 --batch-size 128 \
    --epochs 5 --warmup-epochs 1
EOF
}

fail() {
  echo "mpirun.sh: $1" >&2
  exit 2
}

# Sets mpi (openmpi4, openmpi5 or mpich) and mpi_name, for example "Open MPI 5.0.11", for the mpirun $1.
identify_mpi() {
  local words
  words="$("$1" --version 2>&1)" || fail "$1 --version failed: $words"
  case "$words" in
    *"(Open MPI) 4."*) mpi=openmpi4 ;;
    *"(Open MPI) "[5-9]*) mpi=openmpi5 ;;
    *HYDRA* | *"Intel(R) MPI"*) mpi=mpich ;;
    *) fail "$1 is not supported (Open MPI 4 and 5, MPICH and Intel MPI are): ${words%%$'\n'*}" ;;
  esac
  mpi_name="$(sed -nE 's/.*\((Open MPI)\) ([^ ]+).*/\1 \2/p; s/.*(Intel\(R\) MPI).*/\1/p
    s/^ *Version: +([^ ]+).*/MPICH \1/p' <<<"$words" | head -1)"
}

# Prints what the words of the program "$@" start: the script or the module.
program_name() {
  case "$1" in
    -m) echo "${2:-}" ;;
    -*) echo python ;;
    *) basename "$1" ;;
  esac
}

# Sets LARS_TERMINAL to the width of the terminal, so that the trainer draws a progress bar. The ranks cannot see the
# terminal, because mpirun gives them pipes.
describe_terminal() {
  local columns=0
  unset LARS_TERMINAL
  [ -t 2 ] || return 0
  read -r _ columns < <(stty size <&2 2>/dev/null) || :
  [ "${columns:-0}" -gt 0 ] || columns=80
  export LARS_TERMINAL="$columns"
}

# Prints how many ranks Open MPI starts on this host by default: one per physical core.
local_slots() {
  local cores
  cores="$(lscpu --online --parse=Core,Socket 2>/dev/null | grep -v '^#' | sort -u | wc -l)" || cores=0
  [ "$cores" -gt 0 ] && echo "$cores" || nproc
}

# Prints the names of the variables that ranks on other hosts need too. CUDA_VISIBLE_DEVICES differs between hosts.
exported_names() {
  compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|LARS_TERMINAL|(HOROVOD|NCCL|OMP|MKL|UCX|FI|TORCH)_.*)$'
}

# Prints the number of ranks per host, from the slots in the list of hosts.
ranks_per_host() {
  local slots
  slots="$({ tr , '\n' <<<"$hosts" && cat "${hostfile:-/dev/null}"; } |
    sed -nE 's/#.*//; s/.*(slots *= *|:)([0-9]+).*/\2/p' | sort -n | tail -1)"
  [ -z "$hosts$hostfile" ] && echo "$ranks" || echo "${slots:-1}"
}

# Kills process $1, Open MPI's mpirun, some seconds after a rank has aborted the job. Otherwise mpirun would wait many
# minutes for a host that it cannot reach.
end_after_abort() {
  until grep -q "MPI_ABORT was invoked" "$session/output"; do sleep 1; done
  sleep 10
  pkill -KILL -P "$1" || : # its ssh, which would keep our output open
  kill -KILL "$1"
}

# Handles signal $1 for mpirun, which is process $2. On INT or TERM, Open MPI's mpirun kills the ranks within a second
# and exits with 1; USR1 reaches the ranks and lets them save. A second request ends mpirun, but only after two seconds,
# because `timeout` sends every signal twice.
ask_to_stop() {
  case "$1" in
    USR*) forward_signal "$1" "$2" ;;
    *)
      if [ -z "$asked" ]; then
        asked=$SECONDS
        forward_signal USR1 "$2"
        echo "mpirun.sh: SIG$1: asked the ranks to save and stop; a second signal ends them at once" >&2 || :
      elif [ $((SECONDS - asked)) -ge 2 ]; then
        forward_signal TERM "$2"
      fi
      ;;
  esac
}

# Shows what mpirun prints, and copies it to a file in the session folder. Signals are for mpirun.
show_output() {
  trap "" HUP INT QUIT TERM USR1 USR2
  tee "$session/output" | { "$python" -I -S "$root/launch/mpirun_output.py" || cat; }
  touch "$session/shown" 2>/dev/null || : # if a stuck ssh held the pipe, the folder is gone
}

# Runs the command "$@" and shows its stderr. If stdout goes to the terminal too, both take the same way: otherwise the
# lines of one would tear the progress bar of the other.
with_output() {
  if [ -n "${LARS_TERMINAL:-}" ] && [ -t 1 ]; then
    "$@" > >(show_output) 2>&1
  else
    "$@" 2> >(show_output >&2)
  fi
}

# Runs the mpirun command "$@" and returns the exit code of the ranks. mpirun gets its own process session, so that
# Ctrl-C reaches it only through ask_to_stop. It also gets its own session folder: Open MPI 5 fails if it finds a folder
# with its own process number, left behind by an mpirun that was killed. Its daemons on other hosts do not have this
# problem.
run_mpirun() {
  local code=0 aborted watcher=:
  asked=""
  session="$(mktemp -d "${TMPDIR:-/tmp}/mpirun.XXXXXX")"
  [ -n "${PRTE_MCA_prte_tmpdir_base:-}" ] || export PRTE_MCA_prte_local_tmpdir_base="$session"
  [ -z "$several_hosts" ] || watcher=end_after_abort
  source "$root/launch/run_to_its_end.sh"
  with_output run_to_its_end "$watcher" ask_to_stop setsid "$@" || code=$?
  for _ in {1..20}; do # `wait` could hang, because a stuck ssh may hold the pipe
    [ ! -e "$session/shown" ] || break
    sleep 0.05
  done
  if [ "$code" -eq 0 ] && grep -q "has lost communication with a remote daemon" "$session/output"; then
    code=7 # mpirun reports the lost host but exits with 0
  fi
  aborted="$(sed -nE 's/^ *Errorcode: ([0-9]+).*/\1/p' "$session/output" | head -1)"
  case "$code" in
    1) code="${aborted:-1}" ;; # mpirun was asked to end while the ranks were already ending with their own code
    137) [ -z "$several_hosts" ] || code="${aborted:-137}" ;; # killed by end_after_abort
  esac
  rm -rf "$session"
  case "$code" in # the terminal may be closed by now
    0) ;;
    75) echo "mpirun.sh: the ranks stopped on request (exit code 75)" >&2 || : ;;
    *) echo "mpirun.sh: exit code $code (see docs/troubleshooting.md)" >&2 || : ;;
  esac
  return "$code"
}

ranks="" hosts="" hostfile="" interface="" cpus="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    -np | --np | -n | --hosts | --hostfile | --interface | --cpus-per-rank)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        -n* | --np) ranks="$2" ;;
        --hosts) hosts="$2" ;;
        --hostfile) hostfile="$2" ;;
        --interface) interface="$2" ;;
        --cpus-per-rank) cpus="$2" ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    --*) fail "$1 is not an option of mpirun.sh; see --help" ;;
    *) break ;;
  esac
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "-np needs the number of ranks, got '$ranks'; see --help"
[[ "$cpus" =~ ^([1-9][0-9]*)?$ ]] || fail "--cpus-per-rank needs a number, got '$cpus'"
[ $# -gt 0 ] || fail "a script is missing; see --help"
[ -z "$hosts" ] || [ -z "$hostfile" ] || fail "use --hosts or --hostfile, not both"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || fail "--hostfile: $hostfile cannot be read"

python="$root/.venv/bin/python"
if [ -x "$python" ]; then
  export PATH="$root/.venv/bin:$PATH"
else
  python="$(command -v python3)" || fail "found neither .venv nor python3: run launch/setup.sh"
fi
mpirun="$(command -v mpirun)" || fail "found no mpirun: run launch/setup.sh, or load your cluster's MPI module, or use torchrun (docs/clusters.md)"
identify_mpi "$mpirun"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
  threads="${cpus:-$(($(nproc) / $(ranks_per_host)))}"
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
[ -z "$interface" ] || export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"

describe_terminal
several_hosts=""
[ -z "$hosts$hostfile" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ] || several_hosts=1
line=("$mpirun" -np "$ranks")
if [ "$mpi" = mpich ]; then
  line+=(-bind-to "${cpus:+core:}${cpus:-none}") # its launcher passes on the environment and has no slots
  [ -z "$hosts" ] || line+=(-hosts "$hosts")
  [ -z "$hostfile" ] || line+=(-f "$hostfile")
  [ -z "$interface" ] || line+=(-iface "$interface")
else
  daemons=--mca # Open MPI 5 has separate settings for the daemons that start the ranks
  [ "$mpi" = openmpi4 ] || daemons=--prtemca
  [ -n "$cpus" ] && line+=(--map-by "slot:PE=$cpus" --bind-to core) || line+=(--bind-to none)
  [ "$(id -u)" -ne 0 ] || line+=(--allow-run-as-root)
  if [ -n "$hosts$hostfile" ]; then
    [ -z "$hosts" ] || line+=(--host "$hosts")
    [ -z "$hostfile" ] || line+=(--hostfile "$hostfile")
    for name in $(exported_names); do line+=(-x "$name"); done
  elif [ -z "${SLURM_JOB_ID:-}" ] && [ "$((ranks * ${cpus:-1}))" -gt "$(local_slots)" ]; then
    [ -z "$cpus" ] || fail "--cpus-per-rank $cpus: this machine has $(local_slots) cores for $ranks ranks"
    [ "$mpi" = openmpi4 ] && line+=(--oversubscribe) || line+=(--map-by :OVERSUBSCRIBE)
  fi
  [ -z "$interface" ] ||
    line+=(--mca btl_tcp_if_include "$interface" "$daemons" oob_tcp_if_include "$interface")
  if [ -n "$several_hosts" ]; then # notice a lost host within 30 s instead of 8 minutes
    line+=("$daemons" oob_tcp_keepalive_time 15 "$daemons" oob_tcp_keepalive_intvl 5)
    line+=("$daemons" oob_tcp_keepalive_probes 3)
  fi
fi
program="$(program_name "$@")"
line+=("$python" "$@")

if [ -n "$dry_run" ]; then
  printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
  printf ' %q' "${line[@]}"
  echo
else
  echo "mpirun.sh: starting $ranks rank$([ "$ranks" -eq 1 ] || echo s) of $program with $mpi_name" >&2
  run_mpirun "${line[@]}"
fi
