#!/usr/bin/env bash
# Set up, then lint and test. Ends with pytest's own closing line.
#   bash test.sh                  what needs no more than .venv, in some twelve minutes
#   bash test.sh -m ci            what takes longer, the demo's stages among it; only CI runs it otherwise
#   bash test.sh -m 'not slow'    unit tests only; any pytest arguments
#   bash test.sh -m clients       what we write, read by vLLM and mergekit (4 GB of packages, once); rehearsal: docs/gpu.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash lib/setup.sh
PATH=$PWD/.venv/bin:$PATH

ruff check .
ruff format --check .
mypy
shellcheck -x ./*.sh lib/*.sh examples/slurm/* .ci/run
export WANDB_MODE=offline
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
