#!/usr/bin/env bash
# Starts ranks of a program of this clone with .venv's mpirun, or else with the one on the PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'EOF'
usage: launch/mpirun.sh -np N [--hosts A:4,B:4 | --hostfile FILE] [--dry-run] SCRIPT [ARGUMENTS]

  -np N            how many ranks
  --hosts LIST     where to start them: names with their slots (default: here)
  --hostfile FILE  the same in a file, in the MPI's own format
  --dry-run        print the command instead of running it

Everything from SCRIPT on goes to python unchanged (so -m MODULE works too). The ranks are not bound
to cores: their threads and loader workers may use all. OMP_NUM_THREADS, if it is not set, becomes
this machine's CPUs divided by the ranks.
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

ranks="" hosts="" hostfile="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    -np | -n | --hosts | --hostfile)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        -n*) ranks="$2" ;;
        --hosts) hosts="$2" ;;
        --hostfile) hostfile="$2" ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    *) break ;;
  esac
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "-np needs the number of ranks, got '$ranks'; see --help"
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
  threads=$(($(nproc) / ranks))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

line=("$mpirun" -np "$ranks")
if [ "$mpi" = mpich ]; then
  line+=(-bind-to none) # its launcher passes the environment on and knows no slots
  [ -z "$hosts" ] || line+=(-hosts "$hosts")
  [ -z "$hostfile" ] || line+=(-f "$hostfile")
else
  line+=(--bind-to none)
  [ "$(id -u)" -ne 0 ] || line+=(--allow-run-as-root)
  if [ -n "$hosts$hostfile" ]; then
    [ -z "$hosts" ] || line+=(--host "$hosts")
    [ -z "$hostfile" ] || line+=(--hostfile "$hostfile")
    for name in $(passed_on); do line+=(-x "$name"); done
  elif [ -z "${SLURM_JOB_ID:-}" ] && [ "$ranks" -gt "$(local_slots)" ]; then
    [ "$mpi" = openmpi4 ] && line+=(--oversubscribe) || line+=(--map-by :OVERSUBSCRIBE)
  fi
fi
line+=("$python" "$@")

if [ -n "$dry_run" ]; then
  printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
  printf ' %q' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi
