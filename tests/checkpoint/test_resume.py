"""Compare resumed runs, interrupted in every way, with an uninterrupted one.

The command line runs in this process.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_folder

from megatron_srpo.__main__ import main
from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.rollout.source import LiveRollouts
from megatron_srpo.rollout.transformers.engine import TransformersEngine
from megatron_srpo.training import step_dump as driver
from megatron_srpo.weights.torch_dist import Folder

STEPS = 4
START = (
    Path(__file__).parents[2] / "examples" / "quickstart" / "start"
)  # right on half of its samples: gradients are not zero


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a configuration of four steps, with evaluations and checkpoints after the second and fourth."""
    root = tmp_path_factory.mktemp("resume")
    file = root / "config.yaml"
    file.write_text(
        f"model: {{hf_path: {START}, dtype: float32}}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 4, max_prompt_tokens: 64,"
        " max_response_tokens: 48, batch_size: 3}\n"
        "teacher: {max_prompt_tokens: 200}\n"
        f"train: {{steps: {STEPS}}}\n"
        "optimizer: {lr: 2.0e-4, lr_warmup_steps: 3}\n"
        "evaluation: {every: 2, prompts: 2, samples: 2}\n"
        "checkpoint: {save_interval: 2}\n"
        "logging: {dir: set}\n"
    )
    return file


@pytest.fixture
def command(config, monkeypatch, capsys):
    """Return a function of (run, *overrides) that returns (exit status, standard error)."""

    def run(folder, *overrides):
        monkeypatch.setattr(
            sys, "argv", ["megatron_srpo", "train", str(config), f"logging.dir={folder}", *overrides]
        )
        status = main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    folder, argv = tmp_path_factory.mktemp("uninterrupted") / "run", sys.argv
    sys.argv = ["megatron_srpo", "train", str(config), f"logging.dir={folder}"]
    assert main() == 0
    sys.argv = argv
    assert all(row["grad_norm"] > 0 and row["sdpo_token_share"] > 0 for row in rows(folder) if "loss" in row)
    return folder


def rows(run):
    """Return metrics.jsonl without the fields that depend on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
        for line in lines
    ]


def saved_tensors(checkpoint):
    folder = Folder(checkpoint)
    return {key: folder.read(key) for key in folder.chunks}


def assert_same(run, uninterrupted):
    """Compare weights, metrics, samples and the last checkpoint's tensors, bit for bit."""
    assert rows(run) == rows(uninterrupted)
    for one, other in (
        [load_file(folder / "hf" / "model.safetensors") for folder in (run, uninterrupted)],
        [saved_tensors(folder / "checkpoints" / f"step_{STEPS:06d}") for folder in (run, uninterrupted)],
    ):
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    for step in range(1, STEPS + 1):
        assert (run / "rollouts" / f"step_{step:06d}.jsonl").read_bytes() == (
            uninterrupted / "rollouts" / f"step_{step:06d}.jsonl"
        ).read_bytes()


def interrupt_in_step(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while the samples of `step` are being written."""
    real = driver.write_samples

    def write_samples(groups, outlines, folder, at, layout):
        real(groups, outlines, folder, at, layout)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(driver, "write_samples", write_samples)


@pytest.mark.parametrize(
    ("step", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (3, signal.SIGINT), (4, signal.SIGTERM)]
)
def test_a_signal_saves_and_the_same_command_resumes(
    command, uninterrupted, tmp_path, monkeypatch, step, number
):
    # After any step, also one whose evaluation was due: the resumed run makes up for it.
    interrupt_in_step(monkeypatch, step, number)
    status, said = command(tmp_path / "run")
    assert (
        status == 75
        and f"{signal.Signals(number).name} was received: checkpoint saved at step {step}/{STEPS}" in said
    )
    assert (
        len([row for row in rows(tmp_path / "run") if "loss" in row]) == step
        and not (tmp_path / "run" / "hf").exists()
    )
    monkeypatch.undo()
    status, said = command(tmp_path / "run")
    assert status == 0 and f"resuming from step {step}" in said
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.async_steps=1"],
        ["rollout.over_sampling=2", "rollout.dynamic_filtering=true", "rollout.batch_size=6"],
    ],
    ids=["one step off", "over-sampling"],
)
def test_a_batch_in_flight_is_resumed(command, tmp_path, monkeypatch, overrides):
    # The batch was sampled ahead with the previous weights, or continues aborted responses: its samples equal
    # those of the uninterrupted run.
    assert command(tmp_path / "uninterrupted", *overrides)[0] == 0
    interrupt_in_step(monkeypatch, 2)
    assert command(tmp_path / "run", *overrides)[0] == 75
    monkeypatch.undo()
    assert command(tmp_path / "run", *overrides)[0] == 0
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")
    stale = [row["staleness_max"] for row in rows(tmp_path / "run") if "loss" in row]
    assert max(stale) == 1, stale


def test_the_clock_saves_and_leaves(command, tmp_path):
    status, said = command(tmp_path / "run", "checkpoint.exit_duration_in_mins=1e-6")
    reason = "checkpoint.exit_duration_in_mins has passed"
    assert status == 75 and f"{reason}: checkpoint saved at step 1/4" in said


@pytest.mark.parametrize(("is_truncated", "left"), [(False, 4), (True, 8)])
def test_samples_of_an_unfinished_step_are_reused(
    command, uninterrupted, tmp_path, monkeypatch, is_truncated, left
):
    # Killed when one of step 3's two waves is done: its samples are not sampled again. A wave that was not
    # written completely is: with fewer rows it would be rounded differently.
    run, real = tmp_path / "run", LiveRollouts.collect

    class Killed(BaseException):
        pass

    def collect(self, step):
        if step == 3:
            ledger = self.builder.ledger
            persist = ledger.persist

            def persist_and_die(at, number, samples):
                persist(at, number, samples)
                raise Killed

            monkeypatch.setattr(ledger, "persist", persist_and_die)
        return real(self, step)

    monkeypatch.setattr(LiveRollouts, "collect", collect)
    with pytest.raises(Killed):
        command(run)
    monkeypatch.undo()
    file = run / "ledger" / "step_000003.rank_00000.jsonl"
    text = file.read_text()
    assert [len(json.loads(line)["samples"]) for line in text.splitlines()] == [4]
    file.write_text(
        text[:-20] if is_truncated else text + '{"round": 1, "samples": [{"prompt"'
    )  # as a kill in the middle of a write does
    asked = []
    generate = TransformersEngine.generate

    def counted(self, requests, *rest):
        asked.append(len(requests))
        return generate(self, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    assert command(run)[0] == 0
    assert asked[0] == left  # of step 3's eight
    assert_same(run, uninterrupted)


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    status, said = command(run)
    assert status == 0 and f"resuming from step {STEPS}" in said
    assert_same(run, uninterrupted)
    assert command(run, f"train.steps={STEPS + 1}", "optimizer.lr=1e-4")[0] == 0
    assert rows(run)[: len(rows(uninterrupted))] == rows(uninterrupted) and rows(run)[-1]["step"] == STEPS + 1
    assert rows(run)[-2]["lr"] == 1e-4 and rows(run)[-2]["weight_version"] == str(STEPS)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_message(command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    file = run / "checkpoints" / f"step_{STEPS:06d}" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100] + b"\1" * 100)
    status, said = command(run)
    assert (
        status == 0 and f"skipping checkpoint at step {STEPS}" in said and "its content has changed" in said
    )
    assert "resuming from step 2" in said
    assert_same(run, uninterrupted)


def test_falling_back_keeps_the_carried_samples_and_threads_are_compared(command, tmp_path):
    # Row: falling back to an earlier checkpoint loses carried samples: 36 of 36 fallbacks differ from the
    # uncut run. Row: "same bits" holds for one thread count.
    overrides = ["rollout.over_sampling=2", "rollout.dynamic_filtering=true", "rollout.batch_size=6"]
    uncut, run = tmp_path / "uncut", tmp_path / "run"
    assert command(uncut, *overrides)[0] == 0
    shutil.copytree(uncut, run)
    assert (run / "checkpoints" / "step_000002" / "carried.jsonl").stat().st_size > 0
    file = run / "checkpoints" / f"step_{STEPS:06d}" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100] + b"\1" * 100)
    status, said = command(run, *overrides)
    assert status == 0 and "resuming from step 2" in said and "threads" not in said
    assert_same(run, uncut)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        status, said = command(run, *overrides)
    finally:
        torch.set_num_threads(threads)
    assert status == 0 and f"for the same bits, set OMP_NUM_THREADS={threads}" in said


def test_without_a_complete_checkpoint_a_run_does_not_restart_silently(command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for step in folders.steps(run / "checkpoints"):
        (run / "checkpoints" / f"step_{step:06d}" / "manifest.json").write_text("")
    before = rows(run)
    status, said = command(run)
    assert status == 2 and "remove the run folder to start the run over" in said and rows(run) == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.name=grpo", "algorithm.name: was 'srpo', is now 'grpo'"),
        ("rollout.temperature=0.7", "rollout.temperature: was 1.0, is now 0.7"),
        ("train.seed=5", "train.seed: was 1, is now 5"),
        ("teacher.ema_rate=0.5", "teacher.ema_rate: was 0.05, is now 0.5"),
        ("optimizer.weight_decay=0", "optimizer.weight_decay: was 0.01, is now 0.0"),
    ],
)
def test_another_configuration_is_refused_and_named(command, uninterrupted, override, said):
    status, text = command(uninterrupted, override)
    assert status == 2 and said in text and "resume.override" in text


def test_the_user_decides_what_may_differ(command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    allowed = "resume.override=[train, rollout.temperature, logging]"
    assert command(run, f"train.steps={STEPS + 1}", "rollout.temperature=0.7", allowed)[0] == 0
    status, said = command(
        run, f"train.steps={STEPS + 2}", "rollout.temperature=0.7", "resume.override=[logging]"
    )
    assert status == 2 and f"train.steps: was {STEPS + 1}, is now {STEPS + 2}" in said


def test_another_model_is_refused_and_named(command, uninterrupted, tmp_path):
    other = save_folder(tmp_path / "other", layers=2)
    status, said = command(
        uninterrupted, f"model.hf_path={other}", "resume.override=[model.hf_path, logging]"
    )
    assert status == 2 and "is a checkpoint of another model" in said
    assert "num_hidden_layers: the checkpoint has 3, model.hf_path 2" in said


def test_policy_and_teacher_become_hugging_face_folders(command, tmp_path, monkeypatch):
    # The policy equals the run's own hf/; the teacher follows it: θ'₂ = 0.95 θ'₁ + 0.05 θ₂.
    run = tmp_path / "run"
    assert command(run, "train.steps=2", "checkpoint.save_interval=1", "evaluation.every=0")[0] == 0

    def tool(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(START.parents[2] / "tools")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(START.parents[2] / "tools" / f"{name}.py"), run_name="__main__")
        return end.value.code

    def convert(checkpoint, weights):
        output = tmp_path / f"{checkpoint.name}-{weights}"
        arguments = (
            "--checkpoint",
            checkpoint,
            "--weights",
            weights,
            "--hf-reference",
            START,
            "--output",
            output,
        )
        assert tool("convert_megatron_to_hf", *arguments) == 0
        return load_file(output / "model.safetensors")

    policy, exported = convert(run, "policy"), load_file(run / "hf" / "model.safetensors")
    assert set(policy) == set(exported) and all(torch.equal(policy[name], exported[name]) for name in policy)
    assert tool("verify_checkpoint", run, run / "hf", "--no-logits") == 0
    before, after = (convert(run / "checkpoints" / f"step_00000{step}", "teacher") for step in (1, 2))
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, 0.95 * before[name] + 0.05 * policy[name], atol=1e-7, rtol=1e-6)
        assert not torch.equal(tensor, before[name])
    assert tool("verify_checkpoint", run, run / "hf", "--weights", "teacher", "--no-logits") == 1


def test_never_means_never(command, uninterrupted):
    status, said = command(uninterrupted, "resume=never")
    assert status == 2 and "already holds a run" in said and "set resume: auto" in said


def test_a_run_without_checkpoints_cannot_resume(command, tmp_path):
    run = tmp_path / "run"
    assert command(run, "checkpoint.save_interval=0", "train.steps=1", "evaluation.every=0")[0] == 0
    assert not (run / "checkpoints").exists() and not list((run / "ledger").iterdir())
    status, said = command(run, "checkpoint.save_interval=0", "train.steps=2", "evaluation.every=0")
    assert status == 2 and "without a checkpoint to resume from" in said


@pytest.mark.parametrize("is_async", ["true", "false"])
def test_a_full_disk_is_reported_and_no_partial_file_looks_complete(command, tmp_path, is_async):
    # Files may grow to 3 MB, less than a checkpoint's: each failure is reported, training continues, and the
    # run ends with an error.
    run = tmp_path / "run"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, before[1]))
    try:
        status, said = command(
            run, f"checkpoint.async_save={is_async}", "evaluation.every=0", "checkpoint.save_interval=1"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1 and len(rows(run)) == STEPS and (run / "hf").is_dir()
    for step in range(1, STEPS + 1):
        assert f"the checkpoint of step {step} could not be written: rank 0: " in said
    assert list((run / "checkpoints").iterdir()) == []
