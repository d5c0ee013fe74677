#!/usr/bin/env bash
# Install llm-compressor beside .venv, in .venv-llm-compressor, where quantise.sh finds it. It asks for a newer
# compressed-tensors than vLLM and an older transformers than .venv has, so that no environment holds all three as pip
# counts; with .venv's transformers it works, as tests/launchers/test_clients.py sees.
#   bash lib/llm_compressor.sh
# Needs .venv (lib/setup.sh) and 30 MB. Runs again at no cost; an interrupted run is finished by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=.venv-llm-compressor
stamp=$folder/.complete-$(sha256sum lib/llm_compressor.sh | cut -c1-16)
exec 8>.setup.lock
flock 8
[ -e "$stamp" ] && exit 0
[ -x .venv/bin/python ] || { echo "error: there is no .venv: run 'bash lib/setup.sh' first" >&2; exit 2; }
echo "llm-compressor: installing into $folder"
rm -rf "$folder"
.venv/bin/python -m pip --disable-pip-version-check --quiet install --progress-bar off --no-deps --target "$folder" \
  llmcompressor==0.14.0.1 compressed-tensors==0.19.0 'auto-round>=0.14.1,<0.15.2' 'loguru>=0.7.2,<1' \
  'nvidia-ml-py>=12.560.30' ||
  { echo "error: pip can't install llm-compressor here: see its message above" >&2; exit 2; }
touch "$stamp"
