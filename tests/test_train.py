"""Test the command line in this process: early refusals, interruptions, and the run folder."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import yaml
from rollouts import write_rollouts
from samples import sample_rows
from tables import each_row
from tiny import make_model, save_folder

from megatron_srpo.__main__ import main
from megatron_srpo.model.hf_folder import HFFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write a start model, two dumped steps and a configuration file for them."""
    root = tmp_path_factory.mktemp("train")
    model = make_model()
    folder = HFFolder(save_folder(root / "hf", model))
    write_rollouts(root / "rollouts", folder, model, steps=2)
    config = root / "config.yaml"
    config.write_text(
        f"model: {{hf_path: {folder.path}, dtype: float32}}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 128,\n"
        "  max_response_tokens: 32}\n"
        "teacher: {max_prompt_tokens: 200}\n"
        "train: {steps: 2, micro_batch_tokens: 400}\n"
        "optimizer: {lr: 1.0e-3, lr_warmup_steps: 0}\n"
        "evaluation: {every: 0, prompts: 4, samples: 2}\n"
        f"logging: {{dir: {root / 'never'}}}\n"
    )
    return root, config


@pytest.fixture
def command(start, monkeypatch, capsys):
    """Return a function of (*overrides) that returns (exit status, standard error)."""

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["megatron_srpo", "train", str(start[1]), *overrides])
        return main(), capsys.readouterr().err

    return run


@each_row(
    "overrides, said",
    [
        (["rollout.sampels_per_prompt=4"], "did you mean samples_per_prompt"),
        (["rollout.samples_per_prompt=1"], "at least 2, not 1"),
        (["rollout.max_response_tokens=0"], "expected more than 0"),
        (["rollout.max_prompt_tokens=20"], "prompt addition/train/0 has"),
        (["parallel.tensor_model_parallel_size=2"], "does not divide the 1 processes"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide the model's num_attention_heads (8)"),
        (["parallel.pipeline_model_parallel_size=3"], "4 layers do not divide into 3 stages"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "needs pipeline_model_parallel_size > 1"),
        (["megatron.recompute_granularty=full"], "did you mean recompute_granularity"),
        (["parallel.context_parallel_size=2"], "× context_parallel_size = 2 does not divide the 1 processes"),
        (["megatron.hidden_size=128"], "comes from config.json"),
        (["megatron.cp_comm_type=a2a"], "local layers gather keys and values"),
        (["megatron.hybrid_context_parallel=true"], "parallel.context_parallel_size splits every sequence"),
        (["model.hf_path=/nowhere"], "is not a folder"),
        (["model.transformer_impl=transformer_engine"], "needs CUDA"),
        (["rollout.replay=/nowhere"], "step_000001.jsonl is missing"),
        (["task.name=sudoku"], "unknown task 'sudoku'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(start, command, overrides, said):
    # Exit status 2, the reason, and no run folder.
    status, error = command(*overrides)
    assert status == 2
    assert said in error
    assert not (start[0] / "never").exists()


def test_prompts_that_share_an_id_are_refused(command, tmp_path):
    # They would form one group, and samples would be lost.
    own = (ROOT / "examples/own_task/backwards.py").read_text()
    for split, called in (("train", "training"), ("test", "test")):
        twice = f"{{split}}/{{index // 2 if split == '{split}' else index}}\","
        (tmp_path / "twice.py").write_text(own.replace('{split}/{index}",', twice))
        status, error = command(f"task.path={tmp_path / 'twice.py'}", "task.name=twice", "evaluation.every=1")
        assert (
            status == 2
            and f"task twice: its {called} prompts 0 and 1 have the same id, 'twice/{split}/0'" in error
        )


def test_a_folder_that_holds_a_run_is_not_written_to(command, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    status, error = command(f"logging.dir={tmp_path}")
    assert status == 2 and "already holds a run (metrics.jsonl)" in error
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("folder", "said"), [("file/sub", "file is not a folder"), ("locked/run", "locked cannot be written to")]
)
def test_a_run_folder_that_cannot_be_made(command, tmp_path, monkeypatch, folder, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and path.name != "locked")
    status, error = command(f"logging.dir={tmp_path / folder}")
    assert status == 2 and error.startswith("configuration error: logging.dir: ") and said in error


def test_a_full_disk_ends_the_run_with_a_line(start, command, tmp_path):
    # Files may grow to 20 kB: no step's dump fits.
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status, error = command(f"rollout.replay={start[0] / 'rollouts'}", f"logging.dir={tmp_path / 'run'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert error == (
        f"stopped: logging.dir: {tmp_path / 'run'}: File too large; "
        "free some space and run the same command again\n"
    )


def test_an_interrupted_command_says_so_in_a_line(command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_srpo.train.preflight", interrupt)
    assert command() == (130, "interrupted\n")


def test_too_few_replayed_steps(start, command, tmp_path):
    status, error = command(
        f"rollout.replay={start[0] / 'rollouts'}", "train.steps=3", f"logging.dir={tmp_path / 'run'}"
    )
    assert status == 2 and "step_000003.jsonl is missing, but train.steps is 3" in error


def test_a_run_that_diverges_stops_with_a_reason_and_a_readable_folder(start, command, tmp_path):
    # A learning rate of 1e30 makes the second step non-finite: it is skipped and counted, and the run ends
    # after max_skipped_updates in a row.
    run = tmp_path / "run"
    status, error = command(
        f"rollout.replay={start[0] / 'rollouts'}",
        "optimizer.lr=1e30",
        "train.max_skipped_updates=1",
        f"logging.dir={run}",
    )
    assert status == 1 and "1 updates in a row had a non-finite loss" in error
    first, second = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert first["updates_skipped"] == 0 and second["updates_skipped"] == 1
    assert second["loss"] is None or second["grad_norm"] is None
    assert (run / "hf" / "model.safetensors").exists()  # the policy of the last finite update is not lost


def test_a_run_leaves_its_folder_and_replays_itself(start, command, tmp_path):
    # Two steps are sampled, then replayed: same losses, same routes, and the documented files and keys.
    sampled, replayed = tmp_path / "sampled", tmp_path / "replayed"
    assert command(f"logging.dir={sampled}", "evaluation.every=1", "train.seed=3")[0] == 0
    assert command(f"rollout.replay={sampled}", f"logging.dir={replayed}", "train.seed=3")[0] == 0
    rows = [json.loads(line) for line in (sampled / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (replayed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
    assert all({"eval/addition/avg@2", "eval/addition/pass@2"} <= set(row) for row in evaluations)
    same = ("loss", "grad_norm", "pass_rate", "policy_entropy", "engine_logprob_gap", "tokens")
    assert [[row[key] for key in same] for row in steps] == [[row[key] for key in same] for row in again]
    assert all(row["engine_logprob_gap_max"] < 1e-4 for row in steps)
    assert [row["weight_version"] for row in steps] == ["0", "1"]
    documented = (
        "step loss grad_norm lr reward_mean pass_rate response_tokens_mean truncated_share format_rate "
        "sdpo_sample_share sdpo_token_share teacherless_failed_share zero_advantage_share policy_entropy "
        "teacher_entropy distillation_divergence entropy_weight_std engine_logprob_gap "
        "importance_clip_share tokens tokens_trained tokens_scored seconds seconds_rollout seconds_verify "
        "seconds_teacher seconds_update seconds_publish weight_version "
    )
    assert set(documented.split()) <= set(steps[0])
    line = sample_rows(sampled / "rollouts" / "step_000002.jsonl")[0]
    assert line["step"] == 2 and line["versions"] == [["1", 0, len(line["response_ids"])]]
    assert {"branch", "advantage", "teacher_ids"} <= set(line["route"])
    assert yaml.safe_load((sampled / "config.yaml").read_text())["train"]["seed"] == 3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(sampled / "hf").config.hidden_size == 64
    assert AutoTokenizer.from_pretrained(sampled / "hf").chat_template
