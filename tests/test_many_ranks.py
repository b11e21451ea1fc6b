"""Test the work of one process in a step of 64 ranks.

Messages, bytes and files must not grow with the number of ranks more than necessary.

The ranks are simulated, one at a time: collectives are counted and do nothing.
"""

from __future__ import annotations

import pytest
import torch
from packed import pack
from rollouts import write_rollouts
from simulated import Collectives, simulated
from thread_ranks import on_ranks
from tiny import make_model, save_folder

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.data.outline import outline
from megatron_srpo.distributed.stop import StopRequest
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.exchange import deliver, share_outlines
from megatron_srpo.rollout.ledger import Ledger
from megatron_srpo.rollout.replay import replay
from megatron_srpo.training import packing
from megatron_srpo.training.packing import PackingRules
from megatron_srpo.training.trainer import Trainer, TrainerSettings

PROMPTS = 64  # of a step: one a rank, where there are 64


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return (folder, configuration, routed groups of a step)."""
    root = tmp_path_factory.mktemp("ranks")
    model = make_model()
    folder = HFFolder(save_folder(root / "hf", model))
    write_rollouts(root / "rollouts", folder, model, verdicts=([1, 0],) * PROMPTS, steps=1, longest=12)
    file = root / "config.yaml"
    file.write_text(
        f"model: {{hf_path: {folder.path}, dtype: float32}}\n"
        f"rollout: {{prompts_per_step: {PROMPTS}, samples_per_prompt: 2, max_prompt_tokens: 128,\n"
        "  max_response_tokens: 64}\n"
        "train: {steps: 3, micro_batch_tokens: 400}\nlogging: {dir: unused}\n"
    )
    config = load_config(file, [])
    return (
        folder,
        config,
        route_groups(
            replay(root / "rollouts", 1, 2, folder), config.algorithm, folder.encode, 160, seed="1/1"
        ),
    )


def samples_of(groups):
    return [sample for group in groups for sample in group]


def test_exchange(start):
    # A rank receives an outline of every sample and the tokens that it trains, on any number of ranks.
    groups = start[2]
    samples = samples_of(groups)
    outlines = [outline(group) for group in groups]
    tokens = {
        number: 4 * len(sample.prompt.ids + (sample.routed.teacher_ids or ())) + 12 * len(sample.response_ids)
        for number, sample in enumerate(samples)
    }
    for ranks in (4, 64):
        wanted = [range(rank, len(samples), ranks)[:: 1 if rank % 2 else -1] for rank in range(ranks)]

        def exchange(layout, ranks=ranks, wanted=wanted):
            mine = groups[layout.rank :: ranks]
            found = share_outlines(mine, layout)
            return layout, found, deliver(mine, found, wanted, layout)

        for layout, found, trained in on_ranks(ranks, exchange):
            own = wanted[layout.rank]
            assert found == outlines and sorted(trained) == sorted(own)
            assert all(trained[number].logprobs == samples[number].logprobs for number in own)
            assert all(trained[number].response_ids == samples[number].response_ids for number in own)
            of_outlines, of_tokens = layout.received
            assert of_outlines <= 150 * len(samples) + 50 * ranks
            assert 0 < of_tokens <= sum(tokens[number] for number in own)
            assert layout.sent[1] <= sum(tokens.values()) * 2 / ranks


def test_packing_builds_only_what_its_rank_trains(start, monkeypatch):
    # No collective, and tensors for this rank's sequences alone.
    built, build = [], packing.micro_batch
    monkeypatch.setattr(
        packing,
        "micro_batch",
        lambda families, *rest: (
            built.append(sum(len(family.sequences) for family in families)) or build(families, *rest)
        ),
    )
    for ranks in (4, 64):
        built.clear()
        with simulated(1, ranks), Collectives() as collectives:
            batch = pack(start[2], 1, ranks, PackingRules(400))
        own = [*batch.micro_batches, *batch.teacher_micro_batches]
        assert built == [len(row.sequences) for row in own] and not collectives.seen
        assert (
            0 < sum(built) <= 2 * 2 * PROMPTS * 2 // ranks
        )  # students and teachers; the balance is of tokens, so up to twice the mean


def test_ledger_writes_do_not_grow(start, tmp_path):
    # Every rank writes the samples that it made itself, and nothing else.
    groups, written = start[2], []
    for ranks in (4, 64):
        for rank in (0, ranks - 1):
            folder = tmp_path / f"{ranks}-{rank}"
            folder.mkdir()
            with simulated(rank, ranks) as layout:
                ledger = Ledger(folder, layout, keeps_samples=True)
                for sample in samples_of(groups[rank::ranks]):
                    ledger.persist(1, 1, [sample])
                ledger.close()
            (file,) = folder.iterdir()
            written.append(len(file.read_text().splitlines()))
    assert written == [32, 32, 2, 2]


def collectives_of_a_step(start, ranks: int) -> list[tuple[str, int]]:
    """Return the collectives of a complete update on a rank in the middle.

    With the teacher, the stop request and an export.
    """
    folder, config, groups = start
    with simulated(ranks // 2, ranks) as layout:
        trainer = Trainer(TrainerSettings.of(config), folder, layout)
        with Collectives() as collectives:
            batches = trainer.pack(groups)
            scores = trainer.score_teacher(batches)
            trainer.update(batches, scores)
            StopRequest(layout, None).reason()
            for _ in trainer.export():
                pass
    return collectives.seen


def test_collectives_of_a_step_do_not_grow(start):
    # As many on 64 ranks as on 4, each of the same size except for the parts of what is shared out.
    few, many = collectives_of_a_step(start, 4), collectives_of_a_step(start, 64)
    assert [name for name, _ in many] == [name for name, _ in few]
    for (name, before), (_, after) in zip(few, many, strict=True):
        padding = 64 * 128 * 4  # of gradient buffers, to a multiple of the ranks
        assert after <= before + padding, name
    assert sum(size for _, size in many) > 0


def test_export_talks_within_a_replica(start):
    # A rank's part in publishing is the model, once, for any number of replicas.
    folder, config, _ = start
    counts = []
    for ranks in (4, 64):
        with simulated(0, ranks, parallel := ParallelSection(tensor_model_parallel_size=2)) as layout:
            trainer = Trainer(
                TrainerSettings.of(config.model_copy(update={"parallel": parallel})), folder, layout
            )
            with Collectives() as collectives, torch.no_grad():
                for _ in trainer.export():
                    pass
        counts.append(collectives.seen)
    assert counts[0] == counts[1] and counts[0]


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
        {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
        },
    ],
)
def test_replicas_are_those_of_megatron(parallel):
    replicas: dict[int, list[int]] = {}
    for rank in range(16):
        with simulated(rank, 16, ParallelSection(**parallel)) as layout:
            replicas.setdefault(layout.data_parallel_rank, []).append(rank)
    assert [layout.data_rank_of(rank) for ranks in replicas.values() for rank in ranks] == [
        data_rank for data_rank, ranks in replicas.items() for _ in ranks
    ]
    assert all(layout.replica_ranks(data_rank) == ranks for data_rank, ranks in replicas.items())
