"""Check what a first-day user meets: pipes, schedulers' variables, closing lines, runs' names, installers."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import QUICKSTART, small_config
from tables import each_row

from megatron_srpo.__main__ import main
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.distributed.layout import Layout, initialize, shut_down
from megatron_srpo.observe.report import _names
from megatron_srpo.observe.reporter import Reporter
from megatron_srpo.observe.terminal import Terminal

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_pipe_whose_encoding_is_ascii(monkeypatch, encoding):
    # Printing × ended the command with a UnicodeEncodeError.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["srpo", "plan", "Qwen/Qwen3-8B"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["srpo", "plan", "Qwen/Qwen3-8B", "train.seed=×"])
    assert main() == 2
    for stream in (out, err):
        stream.flush()
    assert b"8,190,735,360 parameters" in out.buffer.getvalue() and b"train.seed" in err.buffer.getvalue()


@pytest.fixture
def environment(monkeypatch):
    """Set torchrun's variables to exactly these."""

    def change(values):
        for name in (*TORCHRUN, "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@each_row(
    "given",
    [
        {},
        {"MASTER_ADDR": "node1"},  # MASTER_ADDR alone, from a batch script, ended in a traceback
        {"MASTER_PORT": "29500"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "1"},
        {"RANK": "0"},
    ],
)
def test_one_process_needs_no_variables(environment, given):
    environment(given)
    layout = initialize(ParallelSection(), seed=1)
    shut_down(layout)
    assert (layout.rank, layout.world_size) == (0, 1)


@each_row(
    "given, said",
    [
        (
            {"WORLD_SIZE": "2"},
            "RANK and MASTER_ADDR and MASTER_PORT is not set; start the processes with torchrun",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node1"}, "2 processes, but MASTER_PORT is not set"),
        ({"RANK": "1"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: the environment variable is 'two'; expected torchrun's number"),
        ({"RANK": "-1"}, "RANK: the environment variable is '-1'"),
    ],
)
def test_several_processes_need_all_variables(environment, given, said):
    environment(given)
    with pytest.raises(ConfigError, match=re.escape(said)):
        initialize(ParallelSection(), seed=1)


def test_a_mixtures_closing_lines_show_every_task(tmp_path):
    # Only the first task was shown.
    said: list[str] = []
    config = small_config(tmp_path / "run")
    config.logging.dir.mkdir()
    terminal = Terminal("test", 5, enabled=False)
    terminal.say = lambda message, style="": said.append(message)  # type: ignore[method-assign]
    reporter = Reporter(config, Layout(), terminal)
    for step, value in ((0, 0.25), (5, 0.5)):
        scores = {"eval/sums/avg@4": value, "eval/sums/pass@4": 1.0, "eval/maze/avg@4": value / 2}
        reporter.evaluation(
            step, scores | {"eval/maze/validation/avg@4": 0.1, "eval/mean/avg@4": 0.75 * value}
        )
    reporter.summary()
    reporter.close()
    assert [line for line in said if "before" in line] == [
        "sums/avg@4: 0.250 before, 0.500 after",
        "maze/avg@4: 0.125 before, 0.250 after",
        "maze/validation/avg@4: 0.100 before, 0.100 after",
        "mean/avg@4: 0.188 before, 0.375 after",
    ]


@each_row(
    "folders, names",
    [
        # two runs were both shown as quickstart-2…
        (["runs/quickstart-20261125-030441", "runs/quickstart-20261125-041022"], ["030441", "041022"]),
        (
            ["runs/quickstart-20261125-030441-grpo", "runs/other"],
            ["quickstart-20261125-030441-grpo", "other"],
        ),
        (["runs/my_long_name_a", "runs/my_long_name_b"], ["a", "b"]),
        (["first/run", "second/run"], ["first/run", "second/run"]),
        (["runs/alone-1"], ["alone-1"]),
        (["runs/a", "runs/a"], ["a", "a"]),
        (["runs/a-b", "runs/a"], ["a-b", "a"]),
    ],
)
def test_names_of_runs_begin_where_they_differ(folders, names):
    assert _names([Path(folder) for folder in folders]) == names


def script(path: Path, text: str) -> None:
    """Write an executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@each_row("name", ["run.sh", "sglang.sh"])
def test_a_default_run_folder_says_what_the_run_changes(tmp_path, name):
    root = tmp_path / name
    script(root / "examples/quickstart" / name, (QUICKSTART / name).read_text())
    for installer in ("install.sh", "install_sglang.sh"):
        script(root / "tools" / installer, "")
    script(root / ".venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command = [
        "bash",
        str(root / "examples/quickstart" / name),
        "algorithm.name=grpo",
        "optimizer.lr=1e-4",
        "task.path=a/b",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (folder,) = [line for line in lines if line.startswith("logging.dir=")]
    assert re.fullmatch(r"logging\.dir=runs/quickstart(-sglang)?-\d{8}-\d{6}-grpo-1e-4", folder)
    assert lines[-3:] == command[-3:]


def test_a_finished_sglang_environment_is_kept(tmp_path):
    # It was installed at every start: SGLang needs a variable to be imported on a CPU.
    for part in ("tools/install_sglang.sh", "tools/sglang_cpu/requirements.txt"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "tools/sglang_cpu/stubs").mkdir()
    venv = tmp_path / "venv"
    (venv / "packages").mkdir(parents=True)
    shutil.copy(ROOT / "tools/sglang_cpu/requirements.txt", venv / ".installed")
    interpreter = """#!/bin/sh
case "$*" in
    *"import sglang"*) [ "$SGLANG_USE_CPU_ENGINE" = 1 ] || exit 1 ;;
    *sysconfig*) echo "$0/../../packages" | sed 's|/bin/python/../..||' ;;
    *) echo "ran: $*" >&2; exit 1 ;;
esac
"""
    script(venv / "bin/python", interpreter)
    environment = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    command = ["bash", str(tmp_path / "tools/install_sglang.sh"), str(venv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (venv / "packages/sglang_cpu_stubs.pth").is_file()
