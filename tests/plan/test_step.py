"""Compare the planner's FLOP and traffic with torch's counts, and its seconds with the paper's."""

from __future__ import annotations

import pytest
import torch
from rollouts import write_rollouts
from simulated import Collectives, simulated
from tiny import make_model, save_folder
from torch.utils.flop_counter import FlopCounterMode

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.config.load import load_config
from megatron_srpo.data.outline import outline
from megatron_srpo.data.outline_bytes import encode_outlines
from megatron_srpo.data.records import Route, Sample, Segment
from megatron_srpo.data.rollout_file import encode_sample
from megatron_srpo.data.token_bytes import message_bytes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.plan.machine import MACHINES, Workload
from megatron_srpo.plan.step import exchanged_bytes, forward_flops, step_flops, traffic
from megatron_srpo.rollout.replay import replay
from megatron_srpo.training.trainer import Trainer, TrainerSettings

RANKS = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write a folder, dumped rollouts of it, and a configuration file for them."""
    root = tmp_path_factory.mktemp("step")
    model = make_model(tied=False)
    folder = HFFolder(save_folder(root / "hf", model))
    verdicts = ([1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1])  # every sample has a gradient
    write_rollouts(root / "rollouts", folder, model, verdicts, steps=1)
    config = root / "config.yaml"
    config.write_text(
        f"model: {{hf_path: {folder.path}, dtype: float32}}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 128,"
        " max_response_tokens: 64}\n"
        "teacher: {max_prompt_tokens: 160}\n"
        "train: {steps: 3, micro_batch_tokens: 400}\n"
        "logging: {dir: unused}\n"
    )
    return folder, root / "rollouts", config


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_forward_flops(tmp_path, family):
    # Those of transformers' model, whose attention computes the masked half as well.
    model = make_model(family=family)
    architecture, length = HFFolder(save_folder(tmp_path, model)).architecture, 48
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    attention = (
        4
        * architecture.num_attention_heads
        * architecture.head_dim
        * length**2
        * architecture.num_hidden_layers
    )
    head = 2 * length * architecture.hidden_size * architecture.vocab_size
    expected = sum(counts.values()) - head - attention / 2
    rotary = 4 * 8 * length  # transformers' angles are a product of matrices
    assert forward_flops(architecture, length, length) == pytest.approx(expected, abs=2 * rotary)


def test_step_flops(start):
    # By hand, for SRPO with half of the tokens distilled and for GRPO's several updates.
    folder, _, file = start
    a, work = folder.architecture, Workload(prompt_tokens=20, response_tokens=30, distilled_share=0.5)
    head = 2 * a.hidden_size * a.vocab_size * 16 * 30
    forward = forward_flops(a, 16 * 50, 50)
    flops = step_flops(a, load_config(file, []), work)
    assert flops == {
        "update": 3 * forward + 3.5 * head,
        "teacher": forward_flops(a, 8 * 120, 120) + 0.5 * head,
    }
    grpo = load_config(file, ["algorithm.name=grpo", "algorithm.mini_batch_prompts=2"])
    assert step_flops(a, grpo, work._replace(distilled_share=0.0)) == {
        "update": 3 * forward + 3 * head,
        "scoring": forward + head,
    }


def collectives_of_an_update(start, config, ranks):
    """Return (bytes sent in a simulated rank's collectives, their number, samples).

    The teacher has scored before.
    """
    folder, rollouts, _ = start
    with simulated(1, ranks, config.parallel) as layout:
        groups = route_groups(
            replay(rollouts, 1, 4, folder), config.algorithm, folder.encode, 160, seed="1/1"
        )
        trainer = Trainer(TrainerSettings.of(config), folder, layout)
        trainer.rules = trainer.rules._replace(shares_prompts=False)  # the plan does not count on it
        batches = trainer.pack(groups)
        scores = trainer.score_teacher(batches)
        with Collectives() as collectives:
            assert trainer.update(batches, scores).applied == [True]
    ring = {
        "reduce_scatter": ranks - 1,
        "allgather": (ranks - 1) / ranks,
        "allreduce": 2 * (ranks - 1) / ranks,
    }  # of the bytes it gets
    sent = [size * share for name, size in collectives.seen for kind, share in ring.items() if kind in name]
    assert len(sent) == len(collectives.seen)
    return sum(sent), [sample for group in groups for sample in group]


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_replication_traffic_is_what_a_step_sends(start, distributed):
    # Gradients, weights and the teacher, by the collectives of a complete update on a simulated rank.
    config = load_config(start[2], [f"parallel.use_distributed_optimizer={distributed}"])
    sent, _ = collectives_of_an_update(start, config, RANKS)
    planned = traffic(start[0].architecture, config, MACHINES["cpu"], RANKS, Workload(20, 30, 0.5))
    assert planned["gradients"].bytes + planned["teacher"].bytes == pytest.approx(sent, rel=0.01)


def test_context_parallel_traffic_is_what_a_step_sends(start):
    # Keys, values, their gradients and the last hidden states as well; the padding of documents is left out.
    config = load_config(start[2], ["parallel.context_parallel_size=2"])
    sent, samples = collectives_of_an_update(start, config, 2)
    prompt, response = (
        sum(map(len, ids)) // len(samples)
        for ids in ([s.prompt.ids for s in samples], [s.response_ids for s in samples])
    )
    planned = traffic(start[0].architecture, config, MACHINES["cpu"], 2, Workload(prompt, response, 0.0))
    assert planned["context"].bytes > planned["gradients"].bytes / 4
    assert sum(planned[name].bytes for name in ("gradients", "teacher", "context")) == pytest.approx(
        sent, rel=0.03
    )


def test_exchanged_bytes(start):
    # The lines and arrays of all samples, with four letters a token, to 10 %; the tokens that the
    # first rank trains.
    samples = [sample for group in replay(start[1], 1, 4, start[0]) for sample in group]
    route = Route(branch="grpo", policy_weight=1, distillation_weight=0, advantage=1)

    def made(length: int) -> list[Sample]:
        """Return all samples with responses of `length` tokens: long ones, which are dumped in binary."""
        changed = []
        for sample in samples:
            ids, logprobs = (100_000,) * length, (-1.5,) * length
            segment = Segment(ids=ids, logprobs=logprobs, versions=sample.segments[0].versions)
            text = "four" * length
            update = {"segments": (segment,), "text": text, "route": route}
            changed.append(sample.model_copy(update=update))
        return changed

    few, many = made(2000), made(4000)
    tokens = [sum(len(sample.response_ids) for sample in step) // len(step) for step in (few, many)]
    lines = [sum(len(part) for sample in step for part in encode_sample(sample)) for step in (few, many)]
    messages = [message_bytes(outline(tuple(step))) for step in (few, many)]
    outlines = [len(encode_outlines([outline(tuple(step))])) for step in (few, many)]
    for dumps in (True, False):
        config = load_config(start[2], [f"logging.rollouts={dumps}"])
        factor = len(samples) / (config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
        workload = [Workload(0, count, 0) for count in tokens]
        planned = [exchanged_bytes(config, RANKS, one) * factor for one in workload]
        found = [lines[n] * dumps + messages[n] / RANKS + 2 * outlines[n] for n in (0, 1)]
        assert planned[1] - planned[0] == pytest.approx(found[1] - found[0], rel=0.1 if dumps else 0.01)
