"""Each command imports only what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
MODEL = ("torch", "megatron.core", "transformers")
COMPILER = ("torch._dynamo", "torch._inductor", "networkx")
TRACKERS = ("wandb", "torch.utils.tensorboard", "pandas")
PARALLEL = ("megatron.core", "torch.distributed.tensor", "transformers", *COMPILER, *TRACKERS)
# Runs `srpo` with the arguments after the first, then prints which modules of the first are imported.
PROBE = """
import sys
from megatron_srpo.__main__ import main
names = sys.argv.pop(1).split(",")
assert main() in (0, None)
print([name for name in names if name in sys.modules])
"""


def imported(names: tuple[str, ...], *arguments: str | Path) -> str:
    """Return the last line that `srpo` with these arguments prints, then which of `names` it imported."""
    command = [sys.executable, "-c", PROBE, ",".join(names), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Train a step, which imports no compiler, and evaluate; return the folder of `run` and `evaluation`."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "evaluation.prompts=2"]
    config, settings = QUICKSTART / "config.yaml", ["train.steps=1", f"logging.dir={folder / 'run'}", *small]
    assert imported((*COMPILER, *TRACKERS), "train", config, *settings) == "[]"
    settings = [f"logging.dir={folder / 'evaluation'}", *small]
    assert imported((*COMPILER, *TRACKERS), "eval", config, *settings) == "[]"
    return folder


def test_run(runs):
    assert (runs / "run" / "hf" / "config.json").exists()
    assert (runs / "evaluation" / "result.json").exists()


def test_config():
    assert imported((*MODEL, "numpy"), "config") == "[]"


def test_configuration_check():
    assert imported((*COMPILER, *TRACKERS), "config", "--check", QUICKSTART / "config.yaml") == "[]"


def test_plan():
    arguments = [QUICKSTART / "config.yaml", f"hf_path={QUICKSTART / 'start'}", "--machine", "cpu"]
    assert imported(PARALLEL, "plan", *arguments) == "[]"


def test_inspect(runs):
    assert imported(PARALLEL, "inspect", runs / "run", "--step", "1") == "[]"


def test_report(runs):
    assert imported(PARALLEL, "report", runs / "run") == "[]"


def test_compare(runs):
    assert imported(MODEL, "compare", runs / "evaluation", runs / "evaluation") == "[]"
