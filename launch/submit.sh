#!/usr/bin/env bash
# Submits a recipe to Slurm with launch/slurm_mpirun.sbatch or launch/slurm_srun.sbatch.
set -euo pipefail
users="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'EOF'
usage: launch/submit.sh [--nodes N] [--gpus-per-node N] [--launcher mpirun|srun] [SBATCH OPTIONS]
                        @RECIPE [ARGUMENTS] [--dry-run]

  --nodes N           number of hosts (default: as in the template)
  --gpus-per-node N   GPUs per host, which is also the number of ranks per host; N or TYPE:N, for example a100:4
                      (default: as in the template)
  --launcher NAME     program that starts the ranks: mpirun (default), or srun if it supports PMIx
  --dry-run           print the command instead of running it

Other options before the recipe go to sbatch. Write them as --name=value: --partition=gpu --time=8:00:00 --array=0-4.
Arguments after the recipe go to train_imagenet.py. In an array, %a in these arguments becomes the number of the task.
submit.sh looks for the recipe in the current folder, then in the clone. The job runs in the folder of the clone.
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

launcher=mpirun line=(sbatch) arguments=() array="" dry_run=""
while [ $# -gt 0 ] && [[ "$1" != @* ]]; do
  case "$1" in
    --nodes=* | --gpus-per-node=* | --launcher=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    --nodes | --gpus-per-node | --launcher)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        --launcher) launcher="$2" ;;
        --nodes) number "$1" "$2" && line+=("--nodes=$2") ;;
        *) number "$1" "${2##*:}" && line+=("--gpus-per-node=$2" "--ntasks-per-node=${2##*:}") ;;
      esac
      shift 2
      ;;
    --?*=*)
      case "$1" in
        --array=*) array="$1" ;;
        --cpus-per-task=* | --ntasks-per-node=* | --ntasks=*) number "${1%%=*}" "${1#*=}" ;;
        --time=*)
          [[ "${1^^}" =~ ^--TIME=(([0-9]+-)?[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE)$ ]] ||
            fail "--time needs minutes, HH:MM:SS or DAYS-HH:MM:SS, got '${1#*=}'"
          ;;
      esac
      line+=("$1") && shift
      ;;
    *) fail "$1: expected a recipe (@FILE) or an option for sbatch (--name=value); see --help" ;;
  esac
done
[ $# -gt 0 ] || fail "a recipe is missing: @launch/recipes/imagenet_lars_8192.args; see --help"
[ -f "$users/${1#@}" ] || [ -f "${1#@}" ] ||
  fail "$1: there is no such recipe; the known recipes are $(echo launch/recipes/*.args)"
[ -r "launch/slurm_$launcher.sbatch" ] || fail "--launcher must be mpirun or srun, not $launcher"
for word in "$@"; do
  case "$word" in
    --dry-run) dry_run=1 ;;
    @*)
      [ "$users" = "$PWD" ] || [ ! -f "$users/${word#@}" ] || word="@$users/${word#@}"
      arguments+=("$word")
      ;;
    *) arguments+=("$word") ;;
  esac
done
[ -z "$array" ] || [[ "${arguments[*]}" == *%a* ]] ||
  fail "$array: the tasks would share one run folder; put %a (the task's number) into the arguments: --seed %a"

line+=("launch/slurm_$launcher.sbatch" "${arguments[@]}")
if [ -n "$dry_run" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi
