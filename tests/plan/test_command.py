"""Test the plan command and its search: output, refusals and the layouts found."""

from __future__ import annotations

import json
import sys

import pytest
from tables import each_row

from megatron_srpo.__main__ import main
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.plan.layouts import layouts, plan_for, scale, where_it_stops
from megatron_srpo.plan.machine import MACHINES, Workload
from megatron_srpo.plan.memory import total_parameters
from megatron_srpo.plan.step import active_parameters

QWEN3 = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
QWEN3_8B = QWEN3 | {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
}
QWEN3_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN3_30B = QWEN3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_experts": 128,
}
QWEN3_30B |= {
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
QWEN3_30B |= {"norm_topk_prob": True, "tie_word_embeddings": False}
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


def test_published_models(configure):
    # 8.19 and 30.5 billion parameters, of which 3.3 are active, embedding and output matrix included.
    dense, experts = configure(QWEN3_8B)[0], configure(QWEN3_30B)[0]
    assert total_parameters(dense) == 8_190_735_360 and total_parameters(experts) == 30_532_122_624
    matrices = 2 * experts.vocab_size * experts.hidden_size
    assert active_parameters(experts) + matrices == pytest.approx(3.3e9, rel=0.02)


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
    # The same batch gains less and less; a growing one keeps its step time until every rank reads what all
    # have sampled.
    architecture, config = configure(QWEN3_8B, REPLAY)
    rows = scale(architecture, config, H100, PAPER, [8, 64, 512, 4096])
    strong, weak = [row.strong.step for row in rows], [row.weak.step for row in rows]
    assert strong == sorted(strong, reverse=True) and strong[-1] > strong[0] / 512
    assert weak[1] < 1.4 * weak[0] < weak[-1]
    same, growing = where_it_stops(rows)
    assert same.startswith("same batch: ") and "reading samples: every rank reads the entire batch" in growing


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


@each_row(
    "arguments, said",
    [
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
