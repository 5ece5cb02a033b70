#!/usr/bin/env bash
# Submits a recipe to Slurm with launch/slurm_mpirun.sbatch, slurm_srun.sbatch or slurm_torch.sbatch.
set -euo pipefail
users="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'EOF'
usage: launch/submit.sh [--nodes N] [--gpus-per-node N] [--launcher mpirun|srun|torch]
                        [SBATCH OPTIONS] @RECIPE [ARGUMENTS] [--dry-run]

  -N, --nodes N       number of hosts (default: as in the template)
  --gpus-per-node N   GPUs per host, which is also the number of ranks per host; N or TYPE:N, for example a100:4
                      (default: as in the template)
  --launcher NAME     how the ranks start. mpirun and srun need Horovod, and srun must support PMIx. torch also uses
                      srun, and needs neither Horovod nor MPI nor PMIx (default: mpirun, or torch after
                      setup.sh --no-horovod)
  --dry-run           check the flags and print the command instead of running it

Other options before the recipe go to sbatch: --partition=gpu, --partition gpu, -p gpu, --array=0-4.
Arguments after the recipe go to train_imagenet.py. In an array, %a in these arguments becomes the number of the task.
submit.sh looks for the recipe in the current folder, then in the clone. The job runs in the folder of the clone.
Before anything is submitted, submit.sh checks all flags of the recipe and the arguments.

Example: two hosts with eight GPUs each, for at most eight hours
  launch/submit.sh -N 2 --gpus-per-node 8 -p gpu -t 8:00:00 @launch/recipes/imagenet_lars_8192.args \
    --train-dir /data/imagenet/train --val-dir /data/imagenet/val --dry-run
EOF
}

fail() {
  echo "submit.sh: $1" >&2
  exit 2
}

# number OPTION VALUE: fails unless the value is a positive integer.
number() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number, got '$2'"
}

# Adds option $1 to the sbatch command. $2 is its value, if it has one.
add_option() {
  local name="$1"
  case "$name" in
    -N) name=--nodes ;;
    -n) name=--ntasks ;;
    -c) name=--cpus-per-task ;;
    -t) name=--time ;;
    -a) name=--array ;;
  esac
  case "$name" in
    --nodes | --gpus-per-node | --launcher | --ntasks | --ntasks-per-node | --cpus-per-task | --time | --array)
      [ $# -eq 2 ] || fail "$name needs a value; see --help"
      ;;
  esac
  case "$name" in
    --launcher) launcher="$2" && return ;;
    --nodes | --ntasks | --ntasks-per-node | --cpus-per-task) number "$name" "$2" ;;
    --gpus-per-node) number "$name" "${2##*:}" ;;
    --array) array="$2" ;;
    --time)
      [[ "${2^^}" =~ ^(([0-9]+-)?[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE)$ ]] ||
        fail "--time needs minutes, HH:MM:SS or DAYS-HH:MM:SS, got '$2'"
      ;;
  esac
  case "$name" in
    --*) line+=("$name${2+=$2}") ;;
    *) line+=("$@") ;;
  esac
  [ "$name" != --gpus-per-node ] || line+=("--ntasks-per-node=${2##*:}")
}

# Exits if the training script refuses its flags "$@".
check_flags() {
  local python=.venv/bin/python script errors code=0
  [ -x "$python" ] || python=python3
  script="$(sed -n 's/^script=//p' "launch/slurm_$launcher.sbatch")"
  errors="$("$python" launch/check_flags.py "$script" "$@" 2>&1 >/dev/null)" || code=$?
  case "$code" in
    0) ;;
    2)
      echo "$errors" >&2
      fail "nothing was submitted. Flags of $script go after the recipe, options of sbatch before it"
      ;;
    *) echo "submit.sh: warning: the flags cannot be checked on this machine (${errors##*$'\n'})" >&2 ;;
  esac
}

# Submits the job with the command "$@", and says how to follow and how to stop it.
submit() {
  local answer job log
  command -v sbatch >/dev/null || fail "found no sbatch: run submit.sh where Slurm is, or use launch/mpirun.sh"
  answer="$("$@")"
  echo "$answer"
  [[ "$answer" =~ [0-9]+ ]] || return 0
  job="${BASH_REMATCH[0]}"
  log="$(scontrol show job "$job" 2>/dev/null | sed -n 's/^ *StdOut=//p' | head -1)" || log=""
  {
    if [ -n "$array" ]; then
      echo "  its logs           scontrol show job $job | grep StdOut"
    elif [ -n "$log" ]; then
      echo "  its log            tail -F $(printf %q "$log")"
    fi
    echo "  its state          squeue --jobs=$job"
    echo "  save and requeue   scancel --batch --signal=USR1 $job"
    echo "  end                scancel $job"
  } >&2
}

launcher=mpirun
! grep -qs '"horovod": false' .venv/lars-imagenet.json || launcher=torch
line=(sbatch) arguments=() array="" dry_run=""
while [ $# -gt 0 ] && [[ "$1" != @* ]]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    --?*=*) add_option "${1%%=*}" "${1#*=}" ;;
    -[!-]?*) add_option "${1:0:2}" "${1:2}" ;;
    -*) # the next word is the value, unless it is an option or the recipe
      if [ $# -ge 2 ] && [[ "$2" != [-@]* ]]; then
        add_option "$1" "$2" && shift
      else
        add_option "$1"
      fi
      ;;
    *) fail "$1: expected a recipe (@FILE) or an option for sbatch; see --help" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "a recipe is missing: @launch/recipes/imagenet_lars_8192.args; see --help"
[ -f "$users/${1#@}" ] || [ -f "${1#@}" ] ||
  fail "$1: there is no such recipe; the known recipes are $(echo launch/recipes/*.args)"
[ -r "launch/slurm_$launcher.sbatch" ] || fail "--launcher must be mpirun, srun or torch, not $launcher"
for word in "$@"; do
  case "$word" in
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    @*)
      [ "$users" = "$PWD" ] || [ ! -f "$users/${word#@}" ] || word="@$users/${word#@}"
      arguments+=("$word")
      ;;
    *) arguments+=("$word") ;;
  esac
done
[ -z "$array" ] || [[ "${arguments[*]}" == *%a* ]] ||
  fail "--array=$array: the tasks would share one run folder; put %a (the task's number) into the arguments: --seed %a"
if [ -n "$array" ]; then
  check_flags "${arguments[@]//%a/${array%%[!0-9]*}}"
else
  check_flags "${arguments[@]}"
fi

line+=("launch/slurm_$launcher.sbatch" "${arguments[@]}")
if [ -n "$dry_run" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  submit "${line[@]}"
fi
