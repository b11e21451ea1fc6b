#!/usr/bin/env bash
# Create the virtual environment DIR and install the package into it, editable; return at once if nothing has changed.
#   bash tools/install.sh DIR [extra,extra]
# PYTHON: the interpreter (default python3, 3.11 or newer). TORCH: the torch requirement (default torch==2.13.0;
# without a GPU, pip's own PIP_EXTRA_INDEX_URL may name PyTorch's CPU index, whose wheels are ten times smaller).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 extras=${2:-}
python=${PYTHON:-python3}
stamp="$venv/.installed${extras:+-$extras}"
if [ -e "$stamp" ] && [ ! setup.py -nt "$stamp" ] && "$venv/bin/python" -c 'import megatron_srpo' 2>/dev/null; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed (set PYTHON=…)" >&2
    exit 1
}
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv" # also repairs one without pip
echo "install: packages into $venv (once; some minutes if torch must be downloaded) …"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "${TORCH:-torch==2.13.0}"
"${pip[@]}" --editable ".${extras:+[$extras]}"
touch "$stamp"
