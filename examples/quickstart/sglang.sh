#!/usr/bin/env bash
# Quick start with two real SGLang servers on this machine's CPU: create .venv and .venv-sglang (2 GB, some minutes,
# once), then train.
#   bash examples/quickstart/sglang.sh [section.key=value …]      e.g. rollout.sglang.update=distributed rollout.servers=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/install.sh .venv
bash tools/install_sglang.sh .venv-sglang
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run="runs/quickstart-sglang-$(date +%Y%m%d-%H%M%S)"
for override in "$@"; do # the folder's name says what the run changes
    [[ $override == */* ]] || run+="-$(tr -c 'A-Za-z0-9.\n-' _ <<<"${override#*=}")"
done
exec .venv/bin/python -m megatron_srpo train examples/quickstart/sglang.yaml "logging.dir=$run" "$@"
