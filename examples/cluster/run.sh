#!/usr/bin/env bash
# Train CONFIG on this node's GPUs, with SGLang servers on the same GPUs; restart while the run exits with status 75.
#   bash examples/cluster/run.sh CONFIG [section.key=value …]
# GPUS: how many (default: all). PYTHON: interpreter with this package (default: python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
config=$1
shift
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
while :; do
    status=0
    "${PYTHON:-python}" tools/torchrun.py --standalone --nproc-per-node "$gpus" -m megatron_srpo train "$config" "$@" || status=$?
    [ "$status" -eq 75 ] || exit "$status" # 75: saved and ended after checkpoint.exit_duration_in_mins or a signal
    [ -z "${ONCE:-}" ] || exit "$status"
done
