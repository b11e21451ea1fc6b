#!/usr/bin/env bash
# One node of 8 GPUs, SGLang on the same ones: bash examples/qwen3_8b/run.sh [section.key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../cluster/run.sh" examples/qwen3_8b/config.yaml "$@"
