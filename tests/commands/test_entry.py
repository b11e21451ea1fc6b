"""The `srpo` command: quick without torch, and from a wheel in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
HEAVY = ("torch", "transformers", "megatron.core", "numpy")
# Runs `srpo` with the arguments that follow, then names on the last line the heavy packages it has imported.
PROBE = f"""
import sys
from megatron_srpo.__main__ import main
try:
    main()
except SystemExit as error:
    assert error.code in (0, None), error.code
print([name for name in {HEAVY} if name in sys.modules])
"""


def run(*command: str | Path, **options) -> str:
    """Return what a command that must succeed prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config"]])
def test_answers_without_torch(arguments):
    assert run(sys.executable, "-c", PROBE, *arguments, cwd=ROOT).splitlines()[-1] == "[]"


def test_a_wrong_configuration_is_reported_without_torch(tmp_path):
    # Wrong keys of the file are reported before anything that needs torch is imported.
    file = tmp_path / "config.yaml"
    file.write_text("modell: {}\n")
    code = "import sys; from megatron_srpo.__main__ import main; status = main();"
    code += "print(status, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "--check", file], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert f"{file}:1: modell: unknown key; did you mean model?" in done.stderr


def test_completion_is_argcompletes(tmp_path):
    """The parser goes to argcomplete when its shell function asks, and only then."""
    (tmp_path / "argcomplete.py").write_text("def autocomplete(parser):\n    print(parser.prog)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "megatron_srpo", "config", "--help"]
    assert run(*command, env=environment | {"_ARGCOMPLETE": "1"}).startswith("srpo\nusage:")
    assert run(*command, env=environment).startswith("usage:")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the sources: setuptools leaves build/ where it works."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_srpo", source / "megatron_srpo", ignore=shutil.ignore_patterns("*.pyc"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Install the wheel into an empty environment; a .pth file adds this interpreter's packages."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(venv / "bin" / "python", "-c", code).strip())
    # .pth files in there, such as that of an editable installation, are not read.
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return venv


def outside(folder: Path) -> dict:
    """Return options of `run` for a process that finds nothing of the checkout."""
    hidden = {"PYTHONPATH", "RANK", "WORLD_SIZE"}
    return {"cwd": folder, "env": {key: value for key, value in os.environ.items() if key not in hidden}}


def test_the_wheel_is_whole(installed, tmp_path):
    """Every file of the package that is not compiled is there, templates and scripts included."""
    code = "import megatron_srpo; print(megatron_srpo.__file__)"
    package = Path(run(installed / "bin" / "python", "-c", code, **outside(tmp_path)).strip()).parent
    assert package.is_relative_to(installed)

    def files(folder):
        return {
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }

    assert files(package) == files(ROOT / "megatron_srpo")
    assert {"observe/page/page.html", "observe/page/page.css", "observe/page/charts.js"} <= files(package)


def test_the_wheel_runs(installed, tmp_path):
    """`srpo` outside the checkout: help, the keys, a plan and a report from the templates in the wheel."""
    srpo, options = installed / "bin" / "srpo", outside(tmp_path)
    assert "{train,sample,eval,plan,compare,report,inspect,config" in run(srpo, "--help", **options)
    assert "optimizer.lr" in run(srpo, "config", **options)
    shutil.copy(QUICKSTART / "config.yaml", tmp_path)
    shutil.copytree(QUICKSTART / "start", tmp_path / "start")
    plan = run(srpo, "plan", "config.yaml", "hf_path=start", "--machine", "cpu", "--gpus", "1", **options)
    assert "fits" in plan
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    shutil.copy(QUICKSTART / "config.yaml", run_folder)
    (run_folder / "metrics.jsonl").write_text('{"step": 0, "eval/addition/avg@4": 0.5}\n')
    run(srpo, "report", "run", **options)
    page = (run_folder / "report.html").read_text()
    assert "addition/avg@4" in page and "/*JS*/" not in page
