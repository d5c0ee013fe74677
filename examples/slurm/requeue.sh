# shellcheck shell=bash
# What the jobs here share: sourced by them. PRUNEKIT is this repository, by default where sbatch was called.
# They ask for 8 CPUs a GPU, which decode and load images: without a word Slurm gives a task one, and all GPUs wait for it.
set -euo pipefail
PRUNEKIT=${PRUNEKIT:-${SLURM_SUBMIT_DIR:-$PWD}}
# Since Slurm 22.05 srun no longer takes them from the job by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
[ -f "$PRUNEKIT/lib/common.sh" ] || { echo "error: $PRUNEKIT is not Prune-Kit: call sbatch there, or set PRUNEKIT" >&2; exit 2; }

# until_done COMMAND...: run it, unless an earlier turn of this job has finished OUTPUT. Slurm sends USR1 before the time is
# up (--signal): then it is ended, and the job put into the queue again, where the same command goes on.
until_done() {
  local child code=0 before
  while [[ ${OUTPUT:?set OUTPUT} == ?*/ ]]; do OUTPUT=${OUTPUT%/}; done
  before=$OUTPUT.before-$SLURM_JOB_ID # younger than what the first turn found there
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    unset RESTART # it was for the first turn
    if [ -e "$OUTPUT" ] && [ ! -e "$OUTPUT.run" ] && { [ ! -e "$before" ] || [ "$OUTPUT" -nt "$before" ]; }; then
      echo "$OUTPUT is there already"
      rm -f "$before"
      return
    fi
  elif [ -e "$OUTPUT" ]; then
    touch "$before"
  fi
  "$@" &
  child=$!
  trap 'end "$child"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
  trap 'end "$child"; exit 143' TERM # preempted: Slurm requeues it itself
  wait "$child" || code=$?
  rm -f "$before"
  return "$code"
}
end() {
  trap '' USR1 TERM
  kill -TERM "$1" 2>/dev/null || true
  wait "$1" || true
}
