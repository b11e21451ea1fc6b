#!/usr/bin/env bash
# Quick start: create .venv, install, train a small Qwen3 with SRPO for 30 steps, print the pass rate before and after.
#   bash examples/quickstart/run.sh [section.key=value …]      e.g. algorithm.name=grpo train.steps=60
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/install.sh .venv
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # more threads do not help such a small model
run="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for override in "$@"; do # the folder's name says what the run changes
    [[ $override == */* ]] || run+="-$(tr -c 'A-Za-z0-9.\n-' _ <<<"${override#*=}")"
done
exec .venv/bin/python -m megatron_srpo train examples/quickstart/config.yaml "logging.dir=$run" "$@"
