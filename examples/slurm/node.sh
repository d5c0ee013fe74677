#!/usr/bin/env bash
# One node's part of a training on several: srun --ntasks-per-node=1 bash examples/slurm/node.sh bash full_run.sh ...
set -euo pipefail
export NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:?not within srun}} NODE_RANK=${SLURM_NODEID:?not within srun}
if [ "$NNODES" -gt 1 ]; then
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # as torchrun's, the same on all nodes
fi
exec "$@"
