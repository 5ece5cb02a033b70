#!/usr/bin/env bash
# Starts ranks of a program of this clone with .venv's mpirun, or else with the one on the PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'EOF'
usage: launch/mpirun.sh -np N [--hosts A:4,B:4 | --hostfile FILE] [--interface NAME] [--cpus-per-rank N]
                        [--dry-run] SCRIPT [ARGUMENTS]

  -np N              how many ranks
  --hosts LIST       where to start them: names with their slots (default: here)
  --hostfile FILE    the same in a file, in the MPI's own format (launch/hostfile.example)
  --interface NAME   the network between the hosts, such as eth0 or ib0, for MPI's TCP and for NCCL's sockets;
                     python -m launch.doctor guesses it. InfiniBand's own protocol is found without it
  --cpus-per-rank N  bind every rank to N cores of its own, for its threads and decoding processes;
                     without it the ranks are not bound, and the kernel spreads them
  --dry-run          print the command instead of running it

Everything from SCRIPT on goes to python unchanged (so -m MODULE works too). OMP_NUM_THREADS, if it is not
set, becomes --cpus-per-rank, or else this machine's CPUs divided by the ranks of a host. Your own variables of
HOROVOD_, NCCL_, OMP_, MKL_, UCX_, FI_ and TORCH_ reach the ranks of all hosts.

Ctrl-C, SIGTERM and a closed terminal reach the ranks as SIGUSR1: the trainer saves and ends with 75. Where SIGUSR1 is
not among its --stop-signals, and in other programs, that ends the ranks at once. The same again, two seconds later
or more, ends them in any case.
EOF
}

fail() {
  echo "mpirun.sh: $1" >&2
  exit 2
}

# Which MPI is it? Prints openmpi4, openmpi5 or mpich.
flavour() {
  local words
  words="$("$1" --version 2>&1)" || fail "$1 --version fails: $words"
  case "$words" in
    *"(Open MPI) 4."*) echo openmpi4 ;;
    *"(Open MPI) "[5-9]*) echo openmpi5 ;;
    *HYDRA* | *"Intel(R) MPI"*) echo mpich ;;
    *) fail "$1 is an MPI that is not known here (Open MPI 4 and 5, MPICH are): ${words%%$'\n'*}" ;;
  esac
}

# The ranks that Open MPI starts here unasked: one for each physical core.
local_slots() {
  local cores
  cores="$(lscpu --online --parse=Core,Socket 2>/dev/null | grep -v '^#' | sort -u | wc -l)" || cores=0
  [ "$cores" -gt 0 ] && echo "$cores" || nproc
}

# Names of the variables that ranks on other hosts need too. CUDA_VISIBLE_DEVICES is each host's own.
passed_on() {
  compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|(HOROVOD|NCCL|OMP|MKL|UCX|FI|TORCH)_.*)$'
}

# The ranks of one host, by the slots of the list of hosts.
ranks_per_host() {
  local slots
  slots="$({ tr , '\n' <<<"$hosts" && cat "${hostfile:-/dev/null}"; } |
    sed -nE 's/#.*//; s/.*(slots *= *|:)([0-9]+).*/\2/p' | sort -n | tail -1)"
  [ -z "$hosts$hostfile" ] && echo "$ranks" || echo "${slots:-1}"
}

# Ends process $1, Open MPI's mpirun, some seconds after a rank has ended the job: it would wait for many minutes for a
# host that cannot be reached.
end_after_abort() {
  until grep -q "MPI_ABORT was invoked" "$session/said"; do sleep 1; done
  sleep 10
  pkill -KILL -P "$1" || : # its ssh, which would hold our output open
  kill -KILL "$1"
}

# Hears signal $1 for process $2. After INT or TERM Open MPI's mpirun kills the ranks within a second and ends with 1; USR1
# reaches them and lets them save. Said again it is meant, but not at once: `timeout` sends every signal twice.
ask_to_stop() {
  case "$1" in
    USR*) hand_on "$1" "$2" ;;
    *)
      if [ -z "$asked" ]; then
        asked=$SECONDS
        hand_on USR1 "$2"
        echo "mpirun.sh: SIG$1: the ranks are asked to save and to stop; once more ends them" >&2 || :
      elif [ $((SECONDS - asked)) -ge 2 ]; then
        hand_on TERM "$2"
      fi
      ;;
  esac
}

# Runs mpirun with "$@", and returns the exit code that the ranks meant. It has a session of its own, so that Ctrl-C reaches
# it by way of ask_to_stop only, and a session folder of its own: Open MPI 5 dies when it finds one with its process
# number, which an mpirun that was killed has left. On other hosts its daemons do not mind.
run_mpirun() {
  local code=0 meant watcher=:
  asked=""
  session="$(mktemp -d "${TMPDIR:-/tmp}/mpirun.XXXXXX")"
  [ -n "${PRTE_MCA_prte_tmpdir_base:-}" ] || export PRTE_MCA_prte_local_tmpdir_base="$session"
  [ -z "$several_hosts" ] || watcher=end_after_abort
  source "$root/launch/run_to_its_end.sh"
  run_to_its_end "$watcher" ask_to_stop setsid "$@" \
    2> >(trap "" HUP INT QUIT TERM && exec tee "$session/said" >&2) || code=$?
  [ "$code" -ne 0 ] || sleep 0.2 # for tee; it cannot be waited for, since a stuck ssh may hold the pipe
  if [ "$code" -eq 0 ] && grep -q "has lost communication with a remote daemon" "$session/said"; then
    code=7 # mpirun says that it has lost a host, and exits with 0
  fi
  meant="$(sed -nE 's/^ *Errorcode: ([0-9]+).*/\1/p' "$session/said" | head -1)"
  case "$code" in
    1) code="${meant:-1}" ;; # it was told to end while the ranks did so themselves
    137) [ -z "$several_hosts" ] || code="${meant:-137}" ;; # end_after_abort
  esac
  rm -rf "$session"
  [ "$code" -eq 0 ] || echo "mpirun.sh: exit code $code: launch/README.md says what it means" >&2
  return "$code"
}

ranks="" hosts="" hostfile="" interface="" cpus="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    -np | -n | --hosts | --hostfile | --interface | --cpus-per-rank)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        -n*) ranks="$2" ;;
        --hosts) hosts="$2" ;;
        --hostfile) hostfile="$2" ;;
        --interface) interface="$2" ;;
        --cpus-per-rank) cpus="$2" ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    *) break ;;
  esac
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "-np needs the number of ranks, got '$ranks'; see --help"
[[ "$cpus" =~ ^([1-9][0-9]*)?$ ]] || fail "--cpus-per-rank needs a number, got '$cpus'"
[ $# -gt 0 ] || fail "a script is missing; see --help"
[ -z "$hosts" ] || [ -z "$hostfile" ] || fail "give --hosts or --hostfile, not both"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || fail "--hostfile: $hostfile cannot be read"

python="$root/.venv/bin/python"
if [ -x "$python" ]; then
  export PATH="$root/.venv/bin:$PATH"
else
  python="$(command -v python3)" || fail "there is neither .venv nor python3: run launch/setup.sh"
fi
mpirun="$(command -v mpirun)" || fail "no mpirun: run launch/setup.sh, or load your cluster's MPI module"
mpi="$(flavour "$mpirun")"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
  threads="${cpus:-$(($(nproc) / $(ranks_per_host)))}"
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
[ -z "$interface" ] || export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"

several_hosts=""
[ -z "$hosts$hostfile" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ] || several_hosts=1
line=("$mpirun" -np "$ranks")
if [ "$mpi" = mpich ]; then
  line+=(-bind-to "${cpus:+core:}${cpus:-none}") # its launcher passes the environment on and knows no slots
  [ -z "$hosts" ] || line+=(-hosts "$hosts")
  [ -z "$hostfile" ] || line+=(-f "$hostfile")
  [ -z "$interface" ] || line+=(-iface "$interface")
else
  daemons=--mca # Open MPI 5 has settings of its own for the daemons that start the ranks
  [ "$mpi" = openmpi4 ] || daemons=--prtemca
  [ -n "$cpus" ] && line+=(--map-by "slot:PE=$cpus" --bind-to core) || line+=(--bind-to none)
  [ "$(id -u)" -ne 0 ] || line+=(--allow-run-as-root)
  if [ -n "$hosts$hostfile" ]; then
    [ -z "$hosts" ] || line+=(--host "$hosts")
    [ -z "$hostfile" ] || line+=(--hostfile "$hostfile")
    for name in $(passed_on); do line+=(-x "$name"); done
  elif [ -z "${SLURM_JOB_ID:-}" ] && [ "$((ranks * ${cpus:-1}))" -gt "$(local_slots)" ]; then
    [ -z "$cpus" ] || fail "--cpus-per-rank $cpus: this machine has $(local_slots) cores for $ranks ranks"
    [ "$mpi" = openmpi4 ] && line+=(--oversubscribe) || line+=(--map-by :OVERSUBSCRIBE)
  fi
  [ -z "$interface" ] ||
    line+=(--mca btl_tcp_if_include "$interface" "$daemons" oob_tcp_if_include "$interface")
  if [ -n "$several_hosts" ]; then # a host that is gone is noticed within 30 s; by default within 8 minutes
    line+=("$daemons" oob_tcp_keepalive_time 15 "$daemons" oob_tcp_keepalive_intvl 5)
    line+=("$daemons" oob_tcp_keepalive_probes 3)
  fi
fi
line+=("$python" "$@")

if [ -n "$dry_run" ]; then
  printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
  printf ' %q' "${line[@]}"
  echo
else
  run_mpirun "${line[@]}"
fi
