"""Test the plan command and its search: output, refusals and the layouts found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tables import each_row

from megatron_srpo.__main__ import main
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.plan.layouts import layouts, plan_for, scale, where_it_stops
from megatron_srpo.plan.machine import MACHINES, Workload
from megatron_srpo.plan.memory import total_parameters
from megatron_srpo.plan.models import PUBLISHED, planned_architecture, published_config
from megatron_srpo.plan.step import active_parameters

QWEN3_8B, QWEN3_30B = published_config("Qwen/Qwen3-8B"), published_config("Qwen/Qwen3-30B-A3B")
PAPER = Workload(256, 1024, 0.25)
H100 = MACHINES["h100"]
REPLAY = "rollout.replay=elsewhere"  # no engine on the training GPUs


@pytest.fixture
def configure(tmp_path):
    """Return a function of (config.json, *overrides) that returns (architecture, configuration)."""

    def make(model: dict, *overrides: str):
        (tmp_path / "config.json").write_text(json.dumps(model))
        file = tmp_path / "run.yaml"
        file.write_text(f"model: {{hf_path: {tmp_path}}}\ntrain: {{steps: 1}}\nlogging: {{dir: unused}}\n")
        return HFFolder(tmp_path).architecture, load_config(file, list(overrides))

    return make


# As published: the sizes of the safetensors files on the Hugging Face Hub, in parameters.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,  # without the copy of the tied matrix
    "Qwen/Qwen3-1.7B": 1_720_574_976,  # also without
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
}
ACTIVE = {"Qwen/Qwen3-30B-A3B": 3.3e9, "Qwen/Qwen3-235B-A22B": 22e9}  # by their model cards


def test_published_models():
    # The config.json of every Qwen3 is known by name; its parameters are the published number.
    assert set(PUBLISHED) == set(PARAMETERS)
    for name, count in PARAMETERS.items():
        architecture = planned_architecture(Path(name))
        assert total_parameters(architecture) == count, name
        if name in ACTIVE:
            matrices = 2 * architecture.vocab_size * architecture.hidden_size
            assert active_parameters(architecture) + matrices == pytest.approx(ACTIVE[name], rel=0.02)


def test_training_time_of_the_paper(configure):
    # 8B on 8 H20s: the planned step without its sampling is 30 to 100 % of the 83 s that SRPO's complete step
    # took (docs/method.md, section 4).
    architecture, config = configure(
        QWEN3_8B, REPLAY, "parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"
    )
    plan = plan_for(architecture, config, MACHINES["h20"], 8, PAPER)
    assert 0.3 * 83.4 <= plan.step <= 83.4
    assert plan.seconds["teacher"] < 0.2 * plan.seconds["update"]


def test_layouts_that_fit_are_the_fastest_first(configure):
    # Each fits, none is impossible; more memory never removes one; 30B on one GPU has none.
    architecture, config = configure(QWEN3_8B, REPLAY)
    fitting, impossible, too_large = layouts(architecture, config, H100, 8, PAPER)
    assert fitting and impossible and too_large
    assert [plan.step for plan in fitting] == sorted(plan.step for plan in fitting)
    assert all(plan.problem(H100) is None and plan.bytes <= H100.memory for plan in fitting)
    assert len(layouts(architecture, config, MACHINES["h200"], 8, PAPER)[0]) > len(fitting)
    assert not layouts(*configure(QWEN3_30B, REPLAY), H100, 1, PAPER)[0]


def test_experts_are_shared_out(configure):
    # On 16 GPUs a 30B model with experts fits, with expert parallelism.
    fitting, _, _ = layouts(*configure(QWEN3_30B, REPLAY), H100, 16, PAPER)
    assert fitting[0].config.parallel.expert_model_parallel_size > 1


def test_scale(configure):
    # The same batch gains less and less; a growing one keeps its step time until every rank plans what
    # all have sampled.
    architecture, config = configure(QWEN3_8B, REPLAY)
    rows = scale(architecture, config, H100, PAPER, [8, 64, 512, 4096])
    strong, weak = [row.strong.step for row in rows], [row.weak.step for row in rows]
    assert strong == sorted(strong, reverse=True) and strong[-1] > strong[0] / 512
    assert weak[1] < 1.4 * weak[0] < weak[-1]
    same, growing = where_it_stops(rows)
    assert same.startswith("same batch: ") and "reading samples: every rank reads the outline of" in growing


def test_impossible_layouts_are_refused_with_the_reason(configure):
    architecture, config = configure(
        QWEN3_8B, REPLAY, "parallel.tensor_model_parallel_size=16", "parallel.sequence_parallel=true"
    )
    with pytest.raises(ConfigError, match="16 does not divide the model's num_key_value_heads"):
        plan_for(architecture, config, H100, 16, PAPER)


@pytest.fixture
def command(tmp_path, configure, monkeypatch, capsys):
    """Return a function of (*arguments) that returns (exit status, output, errors)."""
    configure(QWEN3_8B)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["megatron_srpo", "plan", str(tmp_path / "run.yaml"), *arguments])
        return main(), *capsys.readouterr()

    return run


def test_command(command):
    # Exit status 0 when it fits; 1 when it does not, with what takes the memory.
    layout = ["parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true", REPLAY]
    status, out, _ = command(*layout, "--scale")
    assert (
        status == 0 and "fits" in out and "8,190,735,360 parameters" in out and "TP8" in out and "4096" in out
    )
    status, out, _ = command(*layout, "--gpu-memory", "20")
    assert status == 1 and "does not fit: needs" in out and "of 20 GB" in out


def test_overrides_behind_options(command):
    # `plan CONFIG --gpus 8 key=value` said: unrecognized arguments.
    layout = [
        "parallel.tensor_model_parallel_size=8",
        "--gpus",
        "8",
        "parallel.sequence_parallel=true",
        REPLAY,
    ]
    status, out, _ = command(*layout, "--machine", "h200")
    assert status == 0 and "TP8" in out and "8 × h200" in out


def seconds_of(text, what):
    """Return the number behind `what`, in seconds."""
    number, unit = re.search(rf"{what}[^\n]*?, ([\d.,]+) (seconds|minutes|hours)", text).groups()
    return float(number.replace(",", "")) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]


def test_evaluation_and_the_complete_run(command, tmp_path):
    # Neither was counted: the 8B example evaluates 13 times a step's samples every five steps.
    layout = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true", "train.steps=100"]
    layout += ["megatron={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"]
    layout += ["rollout.engine=sglang", "rollout.servers=8", "rollout.colocated=true"]
    _, out, _ = command(*layout, "evaluation.every=0")
    step = float(re.search(r"total +│ ([\d.]+) +│ [\d.]+ +│", out)[1])
    assert "an evaluation" not in out and seconds_of(out, "the complete run") == pytest.approx(
        100 * step, rel=0.03
    )
    file = tmp_path / "chemistry.jsonl"
    file.write_text("".join(f'{{"question": "q{n}", "answer": "1"}}\n' for n in range(208)))
    questions = [f"task.path={file}", "task.verifier=math", "task.test_share=0.99", "evaluation.prompts=null"]
    _, out, _ = command(*layout, *questions)
    assert "206 questions × 16 samples (12.9 × a step's)" in out and "21 of them" in out
    together = 100 * step + 21 * seconds_of(out, "an evaluation")
    assert seconds_of(out, "the complete run") == pytest.approx(together, rel=0.05)
    _, out, _ = command(*layout, "task.name=math", "task.path=/nope", "evaluation.prompts=null")
    assert "evaluation is not counted: task.path: /nope does not exist" in out


def test_a_cpus_peak_is_not_zero(command):
    # It said: 0 TFLOPS.
    _, out, _ = command("--machine", "cpu", "--gpus", "1", REPLAY)
    assert "1 × cpu (16 GB, 0.05 TFLOPS" in out


def test_sampling_may_need_more_memory_than_training(command):
    # Only the training's peak was shown: 7.8 GB planned, 9.4 measured, in a run of 135 million parameters.
    _, out, _ = command(
        "rollout.prompts_per_step=8", "--machine", "h200", "--gpus", "1", "--gpu-memory", "500"
    )
    tokens = 8 * 2048 + 64 * 8192  # 8 prompts, held once, and 8 × 8 samples of the greatest length
    cache = 2 * 36 * 8 * 128 * 2 * tokens / 1e9  # keys and values of 36 layers, 8 heads of 128, in bf16
    states = 8_190_735_360 * (2 + 4 + 12 + 2 + 4 + 2) / 1e9 + 5  # and the engine's copy, and the reserve
    found = re.search(r"it needs up to ([\d.]+) GB; then a rank holds ([\d.]+) GB", out).groups()
    assert [float(one) for one in found] == pytest.approx([cache, states + cache], rel=0.01)


def test_a_model_is_enough(monkeypatch, capsys, tmp_path):
    # By its name, its folder, or its config.json alone; the fastest layout that fits is planned.
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    monkeypatch.setenv("COLUMNS", "200")
    found = []
    for given in ("Qwen/Qwen3-8B", str(tmp_path), str(tmp_path / "config.json")):
        monkeypatch.setattr(sys, "argv", ["srpo", "plan", given, "train.steps=10"])
        assert main() == 0
        found.append(capsys.readouterr().out.partition("\n")[2])
    assert "fits" in found[0] and "the complete run: 10 steps" in found[0] and found[1:] == found[:1] * 2
    monkeypatch.setattr(
        sys, "argv", ["srpo", "plan", "Qwen/Qwen3-8B", "parallel.pipeline_model_parallel_size=2"]
    )
    main()
    assert "PP2 DP4" in capsys.readouterr().out.splitlines()[1]


@each_row(
    "arguments, said",
    [
        (
            ["--gpus", "6", "parallel.tensor_model_parallel_size=4"],
            "does not divide the 6 processes (--gpus)",
        ),
        (["model.hf_path=Qwen/Qwen3-9B"], "expected a folder with a config.json, or one of Qwen/Qwen3-0.6B"),
        (["--machine", "abacus"], "--machine: 'abacus'; expected one of h100"),
        (["--gpus", "0"], "--gpus: 0"),
        (["parallel.pipeline_model_parallel_size=2", "--gpus", "3"], "does not divide the 3 processes"),
        (["parallel.expert_model_parallel_size=2"], "the model has no experts"),
        (["--distilled-share", "2"], "expected --distilled-share from 0 to 1"),
        (["--gpu-memory", "-1"], "--gpu-memory: -1; expected more than 0"),
        (["--mfu", "40"], "--mfu: 40; expected a share, at most 1"),
    ],
)
def test_command_refuses(command, arguments, said):
    status, _, err = command(*arguments)
    assert status == 2 and said in err
