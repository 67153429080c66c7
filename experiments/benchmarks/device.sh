#!/usr/bin/env bash
# Checks and measures vlm_jax on the accelerator of this machine: see device.py for the options.
set -euo pipefail

# Memory is taken as it is needed: other processes may hold some of it.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
# One GPU of several.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
# A second run compiles nothing again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/vlm_jax/compiled}"

exec "${PYTHON:-python3}" "$(dirname "$0")/device.py" "$@"
