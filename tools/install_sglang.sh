#!/usr/bin/env bash
# Makes the virtual environment DIR (default .venv-sglang) with an SGLang server for a CPU; quick when nothing has changed since.
#   bash tools/install_sglang.sh [DIR]
# PYTHON: the interpreter (default python3, 3.11 or newer). On a machine with GPUs install SGLang as its own pages say instead
# and name that environment's interpreter in rollout.sglang.python; this one is how a server runs on a laptop and in the tests.
# tools/sglang_cpu/ holds what it needs: requirements.txt, every version pinned, and stubs/, which stand in for the packages that
# SGLang imports and does not use on a CPU (Triton, torchvision, the CUDA wheel sgl-kernel). Nothing in SGLang is patched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-sglang}
requirements=tools/sglang_cpu/requirements.txt stubs=tools/sglang_cpu/stubs
if ! cmp -s "$requirements" "$venv/.installed" || ! "$venv/bin/python" -c 'import sglang' 2>/dev/null; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$venv" # also one that was left without pip
    echo "install: an SGLang server into $venv (once, 2 GB; some minutes) …"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "$(grep '^torch==' "$requirements")" # with what it needs itself: PyPI's is made for CUDA and does not import without
    "${pip[@]}" --no-deps --requirement "$requirements"
    cp "$requirements" "$venv/.installed"
fi
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$stubs/." "$packages/"
echo "import sglang_cpu_stubs" >"$packages/sglang_cpu_stubs.pth" # run at every start of this interpreter
