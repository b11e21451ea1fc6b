"""Test the plan of an optimizer batch: denominators, and which rank trains which samples."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import alone, batches, flattened, groups_of, pack, plan, policy_positions, samples_of

from megatron_srpo.data.outline import outline
from megatron_srpo.training.batch_plan import balance, loss_scales
from megatron_srpo.training.packing import PackingRules


def test_a_group_is_divided_only_where_that_is_faster():
    def keys(groups, ranks):
        return plan(groups, ranks, PackingRules(token_budget=10**6)).keys

    group = (101, (5,), [("grpo", 5, 0, (), False)] * 4)
    assert keys(groups_of(group, group), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(map(len, keys(groups_of(group), 4))) == [1, 1, 1, 1]
    long = (2, (5,), [("grpo", 300, 0, (), False)] * 4)
    assert sorted(map(len, keys(groups_of(long), 2))) == [2, 2]


def test_samples_without_a_gradient_count_in_the_denominator_and_some_are_scored():
    flat = [("grpo", 3, 0, (), True)] * 9
    groups = groups_of((4, (5,), [*flat, ("none", 3, 0, (), False)]), (4, (5,), [("grpo", 2, 0, (), False)]))
    batch = pack(groups, 0, 1, PackingRules(token_budget=1000))
    assert [sequence.key for row in batch.micro_batches for sequence in row.sequences] == [10]
    scored = [sequence.key for row in batch.scored_micro_batches for sequence in row.sequences]
    assert scored == [0, 8]
    assert batch.loss_scale[10] == pytest.approx(1 / (9 * 3 + 2))  # all but the one that has no route


@given(batches, st.sampled_from(["token_mean", "seq_mean"]))
@settings(deadline=None, max_examples=100)
def test_loss_scales_sum_to_one_over_the_tokens(groups, aggregation):
    samples = flattened(groups)
    scales = loss_scales(flattened(map(outline, groups)), aggregation)
    total = sum(scale * len(policy_positions(sample)) for scale, sample in zip(scales, samples, strict=True))
    routed = [sample.route.branch != "none" for sample in samples]
    assert total == pytest.approx(1.0 if any(routed) else 0.0)
    assert [scale > 0 for scale in scales] == routed


def test_loss_scales_by_hand():
    # Distilled and all-wrong (advantage 0) samples share one denominator; samples without a route are not in
    # it.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 2, 5, 4), ("none", 2, 7, 1), ("grpo", 2, 2, 1))
    outlines = [outline((sample,))[0] for sample in samples]
    assert loss_scales(outlines, "token_mean") == (0.1, 0.1, 0.0, 0.1)
    assert loss_scales(outlines, "seq_mean") == pytest.approx((1 / 9, 1 / 15, 0.0, 1 / 6))


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_balance(costs, bins):
    contents = balance(costs, bins)
    assert len(contents) == bins and sorted(itertools.chain.from_iterable(contents)) == list(
        range(len(costs))
    )
    loads = [sum(costs[item] for item in items) for items in contents]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_ranks_with_nothing_to_do_still_take_part():
    # More ranks than samples: empty rows of one padding token, with nothing to predict and no terms.
    samples = samples_of(("sdpo", 2, 3, 5))
    idle = pack(alone(samples), 1, 2, PackingRules(token_budget=50, length_multiple=4))
    for (row,) in (idle.micro_batches, idle.teacher_micro_batches):
        assert row.sequences == () and row.ids.tolist() == [0, 0, 0, 0] and row.documents.bounds == (0, 4)
        assert len(row.predicts) == len(row.targets) == 0
    assert [
        len(field)
        for field in idle.terms(idle.micro_batches[0], torch.empty(0), None, torch.device("cpu"))[:4]
    ] == [
        0,
        0,
        0,
        0,
    ]
    assert idle.distilled_tokens == 3


def test_nothing_distilled_means_no_teacher_rows_anywhere():
    samples = samples_of(("grpo", 2, 3, 1), ("none", 2, 3, 1))
    for rank in range(3):
        batch = pack(alone(samples), rank, 3, PackingRules(token_budget=50, count_multiple=2))
        assert batch.teacher_micro_batches == [] and batch.distilled_tokens == 0
        assert len(batch.micro_batches) == 2


def test_expensive_samples_are_spread():
    # A distilled sample costs its teacher's forward pass too.
    distilled, plain = ("sdpo", 10, 10, 200), ("grpo", 10, 10, 1)
    samples = samples_of(distilled, plain, distilled, plain, plain, plain)
    for rank in range(2):
        batch = pack(alone(samples), rank, 2, PackingRules(token_budget=1000))
        assert [len(rows[0].sequences) for rows in (batch.micro_batches, batch.teacher_micro_batches)] == [
            3,
            1,
        ]


def test_plan_is_deterministic():
    samples = samples_of(*[("sdpo", 3, 5, 9), ("grpo", 3, 5, 1)] * 4)
    plans = [pack(alone(samples), 0, 2, PackingRules(token_budget=15)).micro_batches for _ in range(2)]
    keys = [[[sequence.key for sequence in row.sequences] for row in plan] for plan in plans]
    assert keys[0] == keys[1] and len(keys[0]) > 1
