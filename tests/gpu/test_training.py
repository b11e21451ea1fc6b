"""Test training on one GPU, in bf16.

Logits, steps, state offloaded to the host, checkpoints, a complete run with the embedded engine.

The first thing to run on a GPU, in a minute or two: python -m pytest -x tests/gpu/test_vocab_parallel.py
tests/gpu/test_training.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save, state_of
from packed import row_of
from reference import Reference
from rollouts import write_rollouts
from small_run import trainers
from tiny import make_model, save_folder

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.checkpoint.state import restore_generators, restore_trainer, scalars
from megatron_srpo.config.load import load_config
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.distributed.layout import initialize, shut_down
from megatron_srpo.model.build import build_chunks
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.replay import replay
from megatron_srpo.training.schedule import run_schedule
from megatron_srpo.weights.torch_dist import Folder
from megatron_srpo.weights.transfer import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]
WITHOUT = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
LAYERS = [
    "local",
    pytest.param("transformer_engine", marks=WITHOUT),
    pytest.param("rope_fusion", marks=WITHOUT),
]


def overrides_of(layers):
    """Return the overrides that select these layers.

    rope_fusion: Transformer Engine's layers and its rotary embeddings, which read packed documents too.
    """
    if layers == "rope_fusion":
        return ["model.transformer_impl=transformer_engine", "megatron.apply_rope_fusion=true"]
    return [f"model.transformer_impl={layers}"]


def configured(root, folder):
    """Return a configuration file for the model in `folder`."""
    file = root / "config.yaml"
    file.write_text(
        f"model: {{hf_path: {folder}, dtype: bfloat16}}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 128,\n"
        "  max_response_tokens: 300}\n"
        "teacher: {max_prompt_tokens: 400}\ntrain: {steps: 3, micro_batch_tokens: 1000}\n"
        "optimizer: {lr: 1.0e-3, lr_warmup_steps: 0}\nlogging: {dir: unused}\n"
    )
    return file


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3_moe"])
def test_logits_are_those_of_transformers(layers, family, tmp_path):
    # Documents of similar length, of very different lengths, and with padding at the end: 3 % of the norm,
    # fp32 against bf16.
    model = make_model(family, tied=family == "qwen3", head_dim=64)
    config = load_config(configured(tmp_path, save_folder(tmp_path / "hf", model)), overrides_of(layers))
    generator = torch.Generator().manual_seed(0)
    found, rows = [], []
    for lengths in ((300, 290), (2, 400, 30), (1,)):
        texts = [torch.randint(3, 270, (length + 1,), generator=generator).tolist() for length in lengths]
        rows.append(texts)

    def keep(number, hidden, chunk):
        found.append((hidden @ chunk.output_weight.t()).float().cpu()[:, :270])
        return hidden.new_zeros(())

    folder, layout = HFFolder(config.model.hf_path), initialize(config.parallel, seed=1)
    try:
        chunks = build_chunks(
            folder.architecture, config.model, config.parallel, config.megatron, layout.device
        )
        load(chunks, folder)
        packed = [row_of(row, sum(len(ids) - 1 for ids in row) + 3) for row in rows]
        run_schedule(chunks, packed, keep, backward=False)
    finally:
        shut_down(layout)
    for logits, row in zip(found, rows, strict=True):
        with torch.no_grad():
            inputs = [torch.tensor([ids[:-1]]) for ids in row]
            expected = torch.cat([model(ids).logits[0] for ids in inputs])
        assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return (configuration file, folder, routed rollouts of two steps).

    Half of the samples are distilled or have an advantage.
    """
    root = tmp_path_factory.mktemp("training")
    model = make_model(head_dim=64)
    folder = HFFolder(save_folder(root / "hf", model))
    rollouts = write_rollouts(root / "rollouts", folder, model, steps=2, longest=300)
    file = configured(root, folder.path)
    algorithm = load_config(file, []).algorithm
    for step in (1, 2):
        groups = route_groups(
            replay(rollouts, step, 4, folder), algorithm, folder.encode, 400, seed=f"1/{step}"
        )
        dump(groups, root / "routed", step)
    return file, folder, root / "routed"


@pytest.fixture
def make_trainer(world):
    """Return a function of (*overrides) that makes a trainer of `world`'s model."""
    with trainers() as make:
        yield lambda *overrides: make(load_config(world[0], list(overrides)))


def train(trainer, world, step):
    """Train one step and return its report."""
    _, folder, routed = world
    groups = route_groups(
        replay(routed, step, 4, folder), trainer.algorithm, folder.encode, 400, seed=f"1/{step}"
    )
    with trainer.onloaded():
        batches = trainer.pack(groups)
        return trainer.update(batches, trainer.score_teacher(batches))


@pytest.mark.parametrize("layers", LAYERS)
def test_two_steps_are_those_of_float64(layers, world, make_trainer):
    # Loss and gradient norm to 5 %: bf16 against autograd on transformers' model. Gradients are summed, and
    # weights kept, in fp32.
    trainer = make_trainer(*overrides_of(layers))
    assert "Triton" in trainer.describe_loss()
    exact = Reference(world[1].path, lr=1e-3, warmup=0, beta=trainer.algorithm.entropy_beta)
    for step in (1, 2):
        report = train(trainer, world, step)
        loss, norm = exact.run(world[2] / f"step_{step:06d}.jsonl")
        assert report.losses[0] == pytest.approx(loss, rel=0.05) and report.grad_norms[0] == pytest.approx(
            norm, rel=0.05
        )
    assert all(
        parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32
        for parameter in trainer.parameters
    )
    assert all(tensor.dtype == torch.float32 for tensor in trainer.optimizer.state())


@pytest.mark.parametrize("optimizer", ["true", "false"])
def test_state_is_the_same_to_the_bit_offloaded_and_from_a_checkpoint(
    optimizer, world, make_trainer, tmp_path
):
    # Training continues from either.
    shared = f"parallel.use_distributed_optimizer={optimizer}"
    colocated = ("rollout.engine=sglang", "rollout.servers=1", "rollout.colocated=true")
    trainer = make_trainer(shared, *colocated)
    train(trainer, world, 1)
    with trainer.onloaded():
        saved, state = state_of(trainer), scalars(trainer)
        held = [
            *trainer.optimizer.state(),
            *trainer.optimizer.gradients(),
            *trainer.teacher.shares,
            *trainer.teacher.parameters,
        ]
        size = sum(tensor.untyped_storage().nbytes() for tensor in held)
        before = torch.cuda.memory_allocated()
    assert 0 < size <= before - torch.cuda.memory_allocated()
    offloaded = state_of(trainer)
    assert saved.keys() == offloaded.keys()
    assert all(torch.equal(saved[key], offloaded[key]) for key in saved)
    save(tmp_path, trainer)
    expected = train(trainer, world, 2)

    trainer = make_trainer(shared, "optimizer.optimizer_cpu_offload=true")
    restore_trainer(trainer, Folder(tmp_path), state)
    restore_generators(Folder(tmp_path), 0)
    found = state_of(trainer)
    assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)
    report = train(trainer, world, 2)
    assert report.losses[0] == pytest.approx(
        expected.losses[0], rel=1e-3
    )  # attention's gradients are summed in any order
    assert report.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-2)


def test_a_run_with_the_embedded_engine_and_its_resumption(tmp_path):
    # Two steps of the quick start in bf16, the first one profiled; then the same command resumes to the
    # third.
    settings = [
        "model.dtype=bfloat16",
        "evaluation.every=0",
        "checkpoint.save_interval=1",
        "logging.profile_steps=[1,1]",
    ]
    settings += [f"logging.dir={tmp_path / 'run'}", "logging.tokens_every=1"]
    for steps in (2, 3):
        command = [
            sys.executable,
            "-m",
            "megatron_srpo",
            "train",
            "examples/quickstart/config.yaml",
            *settings,
            f"train.steps={steps}",
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(row["engine_logprob_gap"] < 0.05 for row in rows if "loss" in row)
    for name in ("trace.json.gz", "table.txt", "memory.pickle"):
        assert (tmp_path / "run" / "profile" / f"rank_00000.{name}").stat().st_size > 1000
