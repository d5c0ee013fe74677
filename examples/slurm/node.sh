#!/usr/bin/env bash
# One node's part of a training on several: srun --ntasks-per-node=1 bash examples/slurm/node.sh bash full_run.sh ...
set -euo pipefail
export NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:?not within srun}} NODE_RANK=${SLURM_NODEID:?not within srun}
if [ "$NNODES" -gt 1 ]; then
  # The first of a list that is read whole: head would end scontrol in the middle of it, and this script with it.
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # as torchrun's, the same on all nodes
fi
exec "$@"
