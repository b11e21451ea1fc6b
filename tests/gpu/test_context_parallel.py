"""Compare a run on two context-parallel GPUs with a run on one.

With Transformer Engine's attention and with local layers.

python -m pytest tests/gpu
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rollouts import write_rollouts
from tiny import make_model, save_folder

from megatron_srpo.model.hf_folder import HFFolder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write a model whose heads flash kernels accept, rollouts of up to 600 tokens and a configuration."""
    root = tmp_path_factory.mktemp("context")
    model = make_model(head_dim=64)
    folder = HFFolder(save_folder(root / "hf", model))
    write_rollouts(root / "rollouts", folder, model, steps=2, longest=600)
    file = root / "config.yaml"
    file.write_text(
        f"model: {{hf_path: {folder.path}, dtype: bfloat16}}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_response_tokens: 600,\n"
        f"  replay: {root / 'rollouts'}}}\n"
        "train: {steps: 2, micro_batch_tokens: 2000}\n"
        "optimizer: {lr_warmup_steps: 0}\n"
        "evaluation: {every: 0}\n"
        "logging: {dir: set}\n"
    )
    return file


def trained(file, name, ranks, *overrides):
    """Return (loss, gradient norm) of each step."""
    folder = file.parent / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_srpo", "train", str(file), *overrides, f"logging.dir={folder}"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_two_gpus_that_share_every_sequence(start, layers):
    # To bf16's rounding: 3 % of loss and gradient norm; a wrong chunk or a missing gradient is off by far
    # more.
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    implementation = f"model.transformer_impl={layers}"
    one = trained(start, f"{layers}-one", 1, implementation)
    two = trained(start, f"{layers}-two", 2, implementation, "parallel.context_parallel_size=2")
    assert len(one) == 2
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0.03, atol=0)


def test_attention_after_a_shared_prefix_needs_no_mask():
    # The queries of a document that continues another one against the keys of both: the flash kernel's values
    # and gradients equal those of the masked formula in fp32.
    from megatron_srpo.distributed.context_parallel import ContextParallel
    from megatron_srpo.model.layers import PackedAttention
    from megatron_srpo.model.packed_row import Documents, attention_batches

    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    torch.manual_seed(1)
    query, key, value = (torch.randn(4096, heads, 64, device="cuda") for heads in (8, 2, 2))
    documents, device = Documents((0, 2048, 4096), (-1, 0)), torch.device("cuda")
    batches = attention_batches(documents, ContextParallel(), device, torch.bfloat16)
    (batch,) = (batch for batch in batches if batch.prefixes is not None)
    found = [tensor.bfloat16().requires_grad_() for tensor in (query, key, value)]
    exact = [tensor.detach().float().requires_grad_() for tensor in found]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = attention._attend(batch, *found)
    assert (
        torch.cuda.max_memory_allocated() - before < 2048 * 4096 / 2
    )  # bytes: half of what a mask would take, let alone scores
    q, k, v = exact[0][2048:], *(tensor.repeat_interleave(4, dim=1) for tensor in exact[1:])
    seen = torch.ones(2048, 4096, dtype=torch.bool, device="cuda").tril(2048)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(output.float().square().sum(), found)
    for own, other in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (own.float() - other).norm() < 0.02 * other.norm()
