#!/usr/bin/env bash
# From a fresh clone to a trained network: installs everything, writes a small real data set and trains on 2 ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'EOF'
usage: launch/quickstart.sh [--compare]

Trains ResNet-18 with LARS on scikit-learn's handwritten digits, on 2 ranks with an effective batch size of 1024.
After setup.sh --no-horovod, torchrun starts the ranks; otherwise launch/mpirun.sh does.
With --compare it then trains with plain SGD at the same batch size and prints both accuracies.
Everything is written to logs/quickstart. Remove that folder to train again from the beginning.
EOF
}

runs=logs/quickstart
digits="$runs/digits"
needed=98 # percent; LARS reached more in every run that was measured

# Trains recipe $1 in a run folder with the same name, and prints the command first.
train() {
  local job=(train_imagenet.py "@launch/recipes/$1.args" --train-dir "$digits/train"
    --val-dir "$digits/val" --log-dir "$runs" --run-name "$1")
  local torchrun=(.venv/bin/torchrun --standalone --nproc-per-node 2)
  if grep -q '"horovod": false' .venv/lars-imagenet.json; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
    printf '\nquickstart: OMP_NUM_THREADS=%s %s\n\n' "$OMP_NUM_THREADS" "$(printf '%q ' "${torchrun[@]}" "${job[@]}")"
    "${torchrun[@]}" "${job[@]}"
  else
    printf '\nquickstart: %s\n\n' "$(launch/mpirun.sh -np 2 --dry-run "${job[@]}")"
    launch/mpirun.sh -np 2 "${job[@]}"
  fi
}

# Prints the last validation top-1, in percent, of run folder $1.
top1() {
  .venv/bin/python - "$runs/$1/metrics.jsonl" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
print(f"{[row['top1'] for row in rows if row['split'] == 'val'][-1]:.1f}")
PY
}

compare=""
for argument in "$@"; do
  case "$argument" in
    --compare) compare=1 ;;
    -h | --help) usage && exit ;;
    *) echo "quickstart.sh: unknown option $argument; see --help" >&2 && exit 2 ;;
  esac
done

./launch/setup.sh
.venv/bin/python -m data.digits "$digits"
cat <<'EOF'

quickstart: validation stays low until about epoch 13, while training improves. That is expected: with 2 steps per
epoch, BatchNorm's running averages lag behind the weights until the learning rate has fallen.
EOF
train digits_lars_1024
[ -z "$compare" ] || train digits_sgd_1024

lars="$(top1 digits_lars_1024)"
echo
echo "quickstart: validation top-1 with LARS at batch size 1024: $lars %"
[ -z "$compare" ] || echo "quickstart: validation top-1 with SGD  at batch size 1024: $(top1 digits_sgd_1024) %"
echo "quickstart: to see the curves: $(printf %q "$PWD/.venv/bin/tensorboard") --logdir $(printf %q "$PWD/$runs")"
if ! awk "BEGIN { exit !($lars >= $needed) }"; then
  echo "quickstart: top-1 is below $needed %, so something is wrong; the run is in $runs/digits_lars_1024" >&2
  exit 1
fi
