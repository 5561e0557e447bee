#!/usr/bin/env bash
# Installs TRL beside this repository and compares our losses with its own: see compare_trl.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .venv-trl/bin/python ] || python3 -m venv .venv-trl
.venv-trl/bin/python -m pip install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0 \
  accelerate==1.15.0 datasets==5.2.0 jax==0.10.2 --editable .
JAX_PLATFORMS=cpu .venv-trl/bin/python -W ignore experiments/peers/compare_trl.py "$@"
