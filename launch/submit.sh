#!/usr/bin/env bash
# Submits a recipe to Slurm, through launch/slurm_mpirun.sbatch or launch/slurm_srun.sbatch.
set -euo pipefail
users="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'EOF'
usage: launch/submit.sh [--nodes N] [--gpus-per-node N] [--launcher mpirun|srun] [SBATCH OPTIONS]
                        @RECIPE [ARGUMENTS] [--dry-run]

  --nodes N           hosts (default: the template's)
  --gpus-per-node N   GPUs, and so ranks, of a host, or TYPE:N, as a100:4 (default: the template's)
  --launcher NAME     who starts the ranks: mpirun (the default), or srun where it speaks PMIx
  --dry-run           print the command instead of running it

Other options before the recipe, written --name=value, go to sbatch: --partition=gpu --time=8:00:00
--array=0-4. What follows the recipe goes to train_imagenet.py; in an array, %a in it is the task's number.
A recipe is looked for in the current folder, then in the clone. The job runs in the clone's folder.
EOF
}

fail() {
  echo "submit.sh: $1" >&2
  exit 2
}

# number OPTION VALUE: refuses what is no number from 1.
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
    *) fail "$1: a recipe (@FILE) or an option for sbatch (--name=value) was expected; see --help" ;;
  esac
done
[ $# -gt 0 ] || fail "a recipe is missing: @launch/recipes/imagenet_lars_8192.args; see --help"
[ -f "$users/${1#@}" ] || [ -f "${1#@}" ] ||
  fail "$1: there is no such recipe; known are $(echo launch/recipes/*.args)"
[ -r "launch/slurm_$launcher.sbatch" ] || fail "--launcher is mpirun or srun, not $launcher"
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
  fail "$array: its tasks would share one run: put %a into the arguments, such as --seed %a; it becomes the task's number"

line+=("launch/slurm_$launcher.sbatch" "${arguments[@]}")
if [ -n "$dry_run" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi
