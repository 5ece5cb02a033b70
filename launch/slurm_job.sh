# What both Slurm templates do; they source it inside a job. Nothing here is to be edited.
# shellcheck shell=bash disable=SC2034

fail() {
  echo "${SLURM_JOB_NAME:-slurm}: $1" >&2
  exit 2
}

# Puts this job back into the queue, under the same number. A job that is being cancelled stays away.
requeue() {
  local job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}" state
  job="${job:-$SLURM_JOB_ID}"
  state="$(squeue --noheader --jobs="$job" --format=%T)" || state=unknown
  if [ "$state" != RUNNING ]; then
    echo "$SLURM_JOB_NAME: saved; not requeued here, since the job is $state (cancelled, or requeued by Slurm)"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
    echo "$SLURM_JOB_NAME: saved; not requeued, since it was $max_restarts times; submit it again to go on" >&2
  else
    echo "$SLURM_JOB_NAME: saved; requeued"
    scontrol requeue "$job"
  fi
}

# Runs the launcher "$@", which passes SIGUSR1 on to its ranks, requeues the job when they were asked to stop, and ends
# with their exit code.
train() {
  local code=0
  run_to_its_end : hand_on "$@" || code=$?
  [ "$code" -ne 75 ] || requeue
  exit "$code"
}

[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [[ "$*" == *%a* ]] ||
  fail "the tasks of an array would share one run: put %a into the arguments, such as --seed %a; it becomes the task's number"
source launch/run_to_its_end.sh
arguments=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
[ ! -x .venv/bin/python3 ] || export PATH="$PWD/.venv/bin:$PATH"
ranks="${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}"
# Said again, because srun takes it from the environment in some versions of Slurm and not in others.
cpus="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
echo "$SLURM_JOB_NAME: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks x $cpus CPUs on $SLURM_JOB_NODELIST"
