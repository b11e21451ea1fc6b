"""Test report and inspect on long samples and many steps: both forms of a dump, limits of page and memory."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from bench._runs import make_run
from rich.console import Console

from megatron_srpo.data import rollout_file
from megatron_srpo.observe import report, report_samples
from megatron_srpo.observe.inspect import inspect
from megatron_srpo.observe.report import report_data
from megatron_srpo.observe.report_process import ReportProcess
from megatron_srpo.observe.run_folder import RunFolder

STEPS, PROMPTS, GROUP, TOKENS = 600, 4, 8, 2048
LARGE = (200, 400, 600)
MEASURE = """
import json, sys
from pathlib import Path
from megatron_srpo.__main__ import main
status = main()
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({"status": status, "bytes": 1024 * int(peak[0]), "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of many thin steps and three with 32 samples of 2,048 tokens, four with token values."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert make_run(folder, STEPS, len(LARGE), PROMPTS, GROUP, TOKENS, 4) == [*LARGE]
    return folder


@pytest.fixture(scope="module")
def inline(run, tmp_path_factory):
    """Return the same run with all arrays in the lines, as older versions wrote them."""
    folder = tmp_path_factory.mktemp("runs") / "inline"
    (folder / "rollouts").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    for file in (run / "rollouts").iterdir():
        if file.suffix == ".jsonl" and "tokens" not in file.name:
            lines = [json.dumps({"step": 1, **line.row}) + "\n" for line in rollout_file.read_step(file)]
            (folder / "rollouts" / file.name).write_text("".join(lines))
        elif file.suffix == ".jsonl":
            (folder / "rollouts" / file.name).write_bytes(file.read_bytes())
    return folder


def shown(folder, step, number=None):
    out = io.StringIO()
    inspect(folder, step, number, Console(file=out, width=200, highlight=False))
    return out.getvalue()


def test_both_forms_show_the_same(run, inline):
    assert list((run / "rollouts").glob("*.bin")) and not list((inline / "rollouts").glob("*.bin"))
    one, other = report_data([run], 5000), report_data([inline], 5000)
    assert one["samples"] == other["samples"] and one["prompts"] == other["prompts"]
    assert {sample["tokens"] for sample in one["samples"]} == {8, TOKENS}
    assert shown(run, 400) == shown(inline, 400)
    distilled = shown(run, 400, 1)
    assert distilled == shown(inline, 400, 1)
    assert f"{TOKENS} tokens (stop)" in distilled and "sibling shown to its teacher (sample 0)" in distilled
    assert "complete prompt of the teacher" in distilled


def test_the_report_of_a_large_run_is_small(run):
    # In a process of its own, which shows that nothing imports torch.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "report", str(run)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0 and not found["torch"] and found["bytes"] < 250e6
    page = (run / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(page) < 20e6 and data["runs"][0]["steps"] == STEPS
    assert {*LARGE} <= {sample["step"] for sample in data["samples"]}


def test_samples_are_read_one_at_a_time(run, tmp_path):
    folder = tmp_path / "run"
    make_run(folder, 1, 1, 4, GROUP, 8192, 0)
    rows, run_folder = list(RunFolder.read(folder).samples(1)), RunFolder.read(folder)
    assert sum(len(row["segments"][0]["ids"]) for row in rows) == 4 * GROUP * 8192  # 18 MB with log-probs
    del rows
    tracemalloc.start()
    data = report_samples.select_samples(run_folder, 5000, 400_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.steps[1]) == 4 * GROUP and peak < 6e6


def test_limits_in_bytes_leave_out_steps_and_cut_texts(run, monkeypatch):
    everything = report_data([run], 5000)
    size = len(json.dumps(everything["samples"] + everything["prompts"]))
    monkeypatch.setattr(report, "SAMPLE_BYTES", size // 3)
    some = report_data([run], 5000)
    assert len(json.dumps(some["samples"] + some["prompts"])) <= size // 3
    steps = {sample["step"] for sample in some["samples"]}
    full = [step for step in LARGE if step in steps]
    assert 1 <= len(full) < 3 and LARGE[-1] in full  # the newest first, and complete ones
    counts = [sum(sample["step"] == step for sample in some["samples"]) for step in full]
    assert counts == [PROMPTS * GROUP] * len(full)
    assert some["notes"] == [
        f"run: this page has the samples of {len(steps)} of {STEPS} steps; rollouts/ has all of them."
    ]
    longest = max(some["samples"], key=lambda sample: len(sample["text"]))
    assert "characters left out …]" in longest["text"]
    for sample in some["samples"]:
        assert 0 <= sample["prompt"] < len(some["prompts"])
        assert some["prompts"][sample["prompt"]]["id"].startswith(f"{sample['step']}/")


def test_a_first_step_above_the_limit_is_shown_in_part(run, monkeypatch):
    monkeypatch.setattr(report, "SAMPLE_BYTES", 60_000)
    data = report_data([run], 5000)
    assert {sample["step"] for sample in data["samples"]} == {LARGE[-1]}
    assert 0 < len(data["samples"]) < PROMPTS * GROUP


def test_token_values_are_cut_in_the_middle(run):
    half = report_samples.TOKENS // 2
    row = json.loads(next(iter((run / "rollouts/step_000200.tokens.jsonl").open())))
    data = report_data([run], 5000)
    key = (200, row["prompt_id"].split("/")[1], row["index"])
    (sample,) = [
        one
        for one in data["samples"]
        if (one["step"], data["prompts"][one["prompt"]]["id"].split("/")[1], one["index"]) == key
    ]
    values = sample["values"]
    assert sample["gap"] == half and values["tokens"][half] == f"[… {TOKENS - 2 * half} tokens left out …]"
    for name, column in values.items():
        assert len(column) == 2 * half + 1
        assert column[:half] == row[name][:half] and column[half + 1 :] == row[name][-half:]
    assert sample["divergence"] == pytest.approx(sum(row["divergence"]) / TOKENS, rel=1e-4)


def test_curves_of_long_runs_show_every_third_step(run, monkeypatch):
    rows = RunFolder.read(run).steps
    keys = len(report_data([run], 1)["runs"][0]["columns"])
    monkeypatch.setattr(report, "CURVE_VALUES", keys * STEPS // 3)
    data = report_data([run], 1)
    found = data["runs"][0]
    # Evaluations and steps with token values are there, too, for the axes of hours and tokens.
    expected = [step for step in range(1, STEPS + 1) if step % 3 == 1 or step % 100 == 0]
    assert found["columns"]["step"] == expected and found["steps"] == STEPS
    totals = list(itertools.accumulate(row["tokens"] for row in rows))
    assert found["tokens"] == [totals[step - 1] for step in expected]
    assert found["columns"]["loss"] == [float(f"{rows[step - 1]['loss']:.5g}") for step in expected]
    assert f"run: its curves show one in 3 of its {STEPS} steps." in data["notes"][0]


def test_quantiles_of_as_many_steps_as_can_be_read(run, monkeypatch):
    assert report_data([run], 1)["runs"][0]["weights"]["steps"] == [*LARGE]
    size = (run / "rollouts/step_000200.tokens.jsonl").stat().st_size
    monkeypatch.setattr(report, "_TOKEN_FILE_BYTES", int(2.5 * size))
    data = report_data([run], 1)
    assert data["runs"][0]["weights"]["steps"] == [LARGE[0], LARGE[-1]]
    assert any("leaves out 1 steps" in note for note in data["notes"])


def test_the_process_of_the_report(run, tmp_path):
    (run / "report.html").unlink(missing_ok=True)
    process = ReportProcess(run)
    assert process.wait() is None and (run / "report.html").is_file()
    assert "is not a run folder" in str(ReportProcess(tmp_path).wait())
    running = ReportProcess(run)
    running.stop()
    assert "exit status -9" in str(running.wait())
    assert not list(Path(run).glob("*.partial"))
