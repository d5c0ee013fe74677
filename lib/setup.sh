#!/usr/bin/env bash
# Make .venv with everything Prune-Kit needs: CUDA packages where there is an NVIDIA GPU, CPU torch elsewhere.
#   bash lib/setup.sh             the GPU packages are 9 GB, for CUDA 13: driver 580 or newer, GPUs since Turing
#   DEVICE=gpu bash lib/setup.sh  tries an older driver, too (CUDA's forward compatibility package makes some do)
#   PYTHON=/opt/python3.11/bin/python3.11 DEVICE=cpu bash lib/setup.sh
# Runs again at no cost; an interrupted run is finished by the next. pip's own settings (PIP_INDEX_URL, ...) apply.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
asked=${DEVICE:-}
DEVICE=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
NEEDED='torch 2.13 for CUDA 13.0 needs an NVIDIA driver of 580 or newer and a GPU of Turing (compute capability 7.5) or newer'

# The stamp names everything that decides what gets installed; it is written last.
stamp=.venv/.complete-$(cat pyproject.toml lib/setup.sh lib/check_cuda.py lib/torchvision_cpu.py <(echo "$DEVICE $PWD") | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

for candidate in "$PYTHON" python3.11 python3.12; do
  "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && PYTHON=$candidate && break
done
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null ||
  { echo "error: Python 3.11 or 3.12 is needed, $PYTHON is not: name one with PYTHON=/path/to/python3.11" >&2; exit 2; }

if [ -z "$asked" ] && [ "$DEVICE" = gpu ]; then # before gigabytes are fetched
  old=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader | awk -F', ' '($2 + 0 < 580 || $3 + 0 < 7.5) && !said++')
  [ -z "$old" ] ||
    { echo "error: $NEEDED; here is $old: update the driver, or install for the CPU with DEVICE=cpu bash lib/setup.sh" >&2; exit 2; }
fi

exec 8>.setup.lock
if ! flock -n 8; then
  echo "setup: waiting for another setup to finish"
  flock 8
fi
[ -e "$stamp" ] && exit 0

echo "setup: installing for $DEVICE into .venv (minutes, once)"
rm -f .venv/.complete-*
.venv/bin/python -m pip --version >/dev/null 2>&1 || rm -rf .venv
[ -d .venv ] || "$PYTHON" -m venv .venv ||
  { echo "error: $PYTHON cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 2; }

pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --quiet --progress-bar off "$@"; }
if [ "$DEVICE" = gpu ]; then
  pip -e '.[gpu,test]'
else
  # Where the index has no CPU build under this name, the CUDA build serves too: larger, and as good.
  pip 'torch==2.13.0+cpu' 2>/dev/null || pip 'torch==2.13.0'
  pip -e '.[test]'
fi

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp lib/torchvision_cpu.py "$site/_prunekit_torchvision_cpu.py"
echo 'import _prunekit_torchvision_cpu' > "$site/_prunekit_torchvision_cpu.pth"
# Imports make a million objects that stay. Python looks for garbage among them behind every 700 (2000 since 3.13): a fifth of a
# start's CPU, and of all that our tests do.
echo 'import gc; gc.set_threshold(10_000)' > "$site/_prunekit_gc.pth"

.venv/bin/python - <<'EOF'
import torchvision, transformers, trl, peft  # noqa: F401
import torch
print(f"setup: torch {torch.__version__}, transformers {transformers.__version__}, ready")
EOF
if [ "$DEVICE" = gpu ]; then
  .venv/bin/python lib/check_cuda.py || { echo "error: CUDA doesn't work in .venv: $NEEDED" >&2; exit 2; }
fi
touch "$stamp"
