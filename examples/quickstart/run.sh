#!/usr/bin/env bash
# The quick start: makes .venv, installs, trains a small Qwen3 by SRPO for 30 steps, prints the pass rate before and after.
#   bash examples/quickstart/run.sh [section.key=value …]      e.g. algorithm.name=grpo train.steps=60
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/install.sh .venv
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model gains nothing from more, and loses much on a busy machine
run="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
exec .venv/bin/python -m megatron_srpo train examples/quickstart/config.yaml "logging.dir=$run" "$@"
