# Common part of the Slurm templates, which source it inside a job. There is nothing to edit here.
# shellcheck shell=bash disable=SC2034

fail() {
  echo "${SLURM_JOB_NAME:-slurm}: $1" >&2
  exit 2
}

# Prints a line of the job's log with the time.
say() {
  echo "$(date '+%F %T') $SLURM_JOB_NAME: $1"
}

# Puts this job back into the queue under the same number, unless it is being cancelled.
requeue() {
  local job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}" state
  job="${job:-$SLURM_JOB_ID}"
  state="$(squeue --noheader --jobs="$job" --format=%T)" || state=unknown
  if [ "$state" != RUNNING ]; then
    say "saved; not requeued here, because the job is $state (cancelled, or requeued by Slurm)"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
    say "saved; not requeued again after $max_restarts times; submit it again to continue" >&2
  else
    say "saved; requeued"
    scontrol requeue "$job"
  fi
}

# Runs the launcher "$@", which forwards SIGUSR1 to its ranks, and exits with their exit code. If the ranks saved and
# stopped on request, the job is requeued first.
train() {
  local code=0
  run_to_its_end : forward_signal "$@" || code=$?
  [ "$code" -ne 75 ] || requeue
  say "job $SLURM_JOB_ID ends with exit code $code"
  exit "$code"
}

[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [[ "$*" == *%a* ]] ||
  fail "the tasks of the array would share one run folder; put %a (the task's number) into the arguments: --seed %a"
source launch/run_to_its_end.sh
arguments=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
[ ! -x .venv/bin/python3 ] || export PATH="$PWD/.venv/bin:$PATH"
ranks="${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}"
# The templates pass this to srun explicitly, because some versions of srun do not read it from the environment.
cpus="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks x $cpus CPUs on $SLURM_JOB_NODELIST"
