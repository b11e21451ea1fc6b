#!/usr/bin/env bash
# Installs into .venv and runs all checks and tests that need only a CPU.
#   bash tests/run.sh [--with-sglang] [pytest arguments …]
# --with-sglang: also tests against real SGLang servers (tests/sglang), installed into .venv-sglang (2 GB, once).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --with-sglang ]; then
    shift
    bash tools/install_sglang.sh .venv-sglang
    export SGLANG_PYTHON="$PWD/.venv-sglang/bin/python"
else
    echo "tests: without --with-sglang, tests against SGLang servers are skipped (tests/sglang)"
fi
bash tools/install.sh .venv test,docs
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "tests: chromium could not be installed: the tests of the report are skipped" >&2
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/lint-imports --no-cache
.venv/bin/pyright --threads 2
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir "$(mktemp -d)"
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Two workers, each with files of its own; then tests/sglang, which shares its servers, in one process.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile --ignore tests/sglang || status=$?
.venv/bin/python -m pytest tests/sglang || status=$?
exit "$status"
