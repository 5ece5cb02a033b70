#!/usr/bin/env bash
# Submits a recipe to Slurm, through launch/slurm_mpirun.sbatch or launch/slurm_srun.sbatch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'EOF'
usage: launch/submit.sh [--nodes N] [--gpus-per-node N] [--launcher mpirun|srun] [SBATCH OPTIONS]
                        @RECIPE [ARGUMENTS] [--dry-run]

  --nodes N           hosts (default: the template's)
  --gpus-per-node N   GPUs, and so ranks, of a host (default: the template's)
  --launcher NAME     who starts the ranks: mpirun (the default), or srun where it speaks PMIx
  --dry-run           print the command instead of running it

Other options before the recipe, written --name=value, go to sbatch: --partition=gpu --time=8:00:00
--array=0-4. What follows the recipe goes to train_imagenet.py; in an array, %a in it is the task's number.
EOF
}

fail() {
  echo "submit.sh: $1" >&2
  exit 2
}

launcher=mpirun line=(sbatch) arguments=() dry_run=""
while [ $# -gt 0 ] && [[ "$1" != @* ]]; do
  case "$1" in
    --nodes=* | --gpus-per-node=* | --launcher=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    --nodes | --gpus-per-node | --launcher)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        --launcher) launcher="$2" ;;
        --nodes) line+=("--nodes=$2") ;;
        *) line+=("--gpus-per-node=$2" "--ntasks-per-node=$2") ;;
      esac
      shift 2
      ;;
    --?*=*) line+=("$1") && shift ;;
    *) fail "$1: a recipe (@FILE) or an option for sbatch (--name=value) was expected; see --help" ;;
  esac
done
[ $# -gt 0 ] || fail "a recipe is missing: @launch/recipes/imagenet_lars_8192.args; see --help"
[ -r "${1#@}" ] || fail "$1: there is no such recipe; known are $(echo launch/recipes/*.args)"
[ -r "launch/slurm_$launcher.sbatch" ] || fail "--launcher is mpirun or srun, not $launcher"
for word in "$@"; do
  [ "$word" = --dry-run ] && dry_run=1 || arguments+=("$word")
done

line+=("launch/slurm_$launcher.sbatch" "${arguments[@]}")
if [ -n "$dry_run" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi
