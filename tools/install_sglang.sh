#!/usr/bin/env bash
# Create the virtual environment DIR (default .venv-sglang) with an SGLang server for a CPU; return at once if nothing
# has changed.
#   bash tools/install_sglang.sh [DIR]
# PYTHON: the interpreter (default python3, 3.11 or newer). On a machine with GPUs install SGLang by its own
# instructions instead, and name that environment's interpreter in rollout.sglang.python; this environment is for
# laptops and for the tests. tools/sglang_cpu/ holds its files: requirements.txt, every version pinned, and stubs/,
# which replace the packages that SGLang imports and does not use on a CPU (Triton, torchvision, the CUDA wheel
# sgl-kernel). Nothing in SGLang is patched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-sglang}
requirements=tools/sglang_cpu/requirements.txt stubs=tools/sglang_cpu/stubs
if ! cmp -s "$requirements" "$venv/.installed" || ! SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -c 'import sglang' 2>/dev/null; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$venv" # also repairs one without pip
    echo "install: an SGLang server into $venv (once, 2 GB; some minutes) …"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "$(grep '^torch==' "$requirements")" # with its dependencies: PyPI's wheel is for CUDA and needs them at import
    "${pip[@]}" --no-deps --requirement "$requirements"
    cp "$requirements" "$venv/.installed"
fi
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$stubs/." "$packages/"
echo "import sglang_cpu_stubs" >"$packages/sglang_cpu_stubs.pth" # runs at every start of this interpreter
