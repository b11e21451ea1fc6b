"""Test packing: no sample is lost, and every position predicts its own target.

Every rank has the same number of micro-batches.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample

from megatron_srpo.data.records import Route
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.training.packing import PackingRules, balance, loss_scales, pack

ROUTES = {  # branch -> (z^GRPO, z^SDPO)
    "grpo": (1.0, 0.0),
    "sdpo": (0.0, 1.0),
    "mixed": (0.9, 0.1),
    "none": (0.0, 0.0),
}


def routed_sample(number, branch, prompt_length, response_length, teacher_length, environment=()):
    """Return sample `number`, whose ids differ from each other and from every other sample's.

    environment: positions in the response that the policy did not write, never all.
    """
    fresh = itertools.count(1000 * number + 1)
    take = lambda count: tuple(next(fresh) for _ in range(count))  # noqa: E731
    policy, distillation = ROUTES[branch]
    route = Route(
        branch=branch,
        policy_weight=policy,
        distillation_weight=distillation,
        advantage=number / 7,
        teacher_ids=take(teacher_length) if distillation else None,
    )
    logprobs = [-number - place / 100 for place in range(response_length)]
    return make_sample(
        number,
        prompt_ids=take(prompt_length),
        response_ids=take(response_length),
        logprobs=logprobs,
        route=route,
        environment=set(environment) - {response_length // 2},
    )


def policy_positions(sample):
    return [position for position, is_policy in enumerate(sample.loss_mask) if is_policy]


def samples_of(*rows):
    return [routed_sample(number, *row) for number, row in enumerate(rows)]


batches = st.lists(
    st.tuples(
        st.sampled_from(sorted(ROUTES)),
        st.integers(1, 20),
        st.integers(1, 20),
        st.integers(1, 60),
        st.sets(st.integers(0, 19)),
    ),
    min_size=0,
    max_size=14,
).map(lambda rows: samples_of(*rows))
all_rules = st.builds(
    PackingRules,
    token_budget=st.integers(1, 90),
    length_multiple=st.sampled_from([1, 2, 4]),
    uniform=st.booleans(),
    count_multiple=st.sampled_from([1, 2, 3]),
    context=st.sampled_from(
        [ContextParallel(rank, size) for size in (1, 1, 2, 3, 4) for rank in range(size)]
    ),
)


def rounded(length, multiple):
    return -(-length // multiple) * multiple


def padded(sequence, context):
    """Return the tokens that a sequence takes.

    Transformer Engine needs a multiple of twice the context-parallel ranks.
    """
    return rounded(sequence.length, 2 * context.size if context.size > 1 else 1)


def rows_of_all(samples, rank, data_size, rules):
    """Return each row of a data-parallel rank, students' and teachers'.

    A row is (its parts on the context-parallel ranks, prompt ids by sample).
    """
    everyone = [
        rules._replace(context=ContextParallel(number, rules.context.size))
        for number in range(rules.context.size)
    ]
    batches = [pack(samples, rank, data_size, own, "token_mean") for own in everyone]
    for name, prompt_of in (
        ("micro_batches", lambda sample: sample.prompt.ids),
        ("teacher_micro_batches", lambda sample: sample.route.teacher_ids),
    ):
        yield from (
            (parts, prompt_of) for parts in zip(*(getattr(batch, name) for batch in batches), strict=True)
        )


def assemble(parts):
    """Return (ids of the complete row, the place in it of each token of the ranks' parts).

    The parts come one after another; places are by their positions.
    """
    bounds = parts[0].cu_seqlens.tolist()
    starts = [start for start, end in itertools.pairwise(bounds) for _ in range((end - start) // len(parts))]
    where = [
        start + position
        for part in parts
        for start, position in zip(starts, part.positions.tolist(), strict=True)
    ]
    assert sorted(where) == list(range(bounds[-1]))
    ids = dict(zip(where, torch.cat([part.ids for part in parts]).tolist(), strict=True))
    return [ids[place] for place in range(len(where))], where


@given(batches, st.integers(1, 4), all_rules)
@settings(deadline=None, max_examples=200)
def test_invariants(samples, data_size, rules):
    packed = [pack(samples, rank, data_size, rules, "token_mean") for rank in range(data_size)]
    distilled = [key for key, sample in enumerate(samples) if sample.route.distillation_weight > 0]
    context = rules.context
    multiple = context.size * (
        math.lcm(2, rules.length_multiple) if context.size > 1 else rules.length_multiple
    )
    for part, keys in (("micro_batches", range(len(samples))), ("teacher_micro_batches", distilled)):
        of_rank = [getattr(batch, part) for batch in packed]
        found = [sequence.key for rows in of_rank for row in rows for sequence in row.sequences]
        assert sorted(found) == list(keys)  # every sample exactly once
        assert len({len(rows) for rows in of_rank}) == 1  # the same number on every rank
        if part == "micro_batches" or distilled:
            assert len(of_rank[0]) >= 1 and len(of_rank[0]) % rules.count_multiple == 0
        else:
            assert of_rank[0] == []
        for row in itertools.chain.from_iterable(of_rank):
            tokens = sum(padded(sequence, context) for sequence in row.sequences)
            assert tokens <= rules.token_budget or len(row.sequences) == 1  # an over-long sequence is alone
            assert len(row.ids) % rules.length_multiple == 0
            if not rules.uniform:
                assert len(row.ids) == rounded(max(tokens, 1), multiple) // context.size
        for rows in of_rank if rules.uniform else []:
            assert len({len(row.ids) for row in rows}) <= 1
            longest = max(
                (sum(padded(sequence, context) for sequence in row.sequences) for row in rows), default=1
            )
            assert all(len(row.ids) == rounded(max(longest, 1), multiple) // context.size for row in rows)
    for batch in packed:
        student_keys = {sequence.key for row in batch.micro_batches for sequence in row.sequences}
        teacher_keys = {sequence.key for row in batch.teacher_micro_batches for sequence in row.sequences}
        assert teacher_keys == student_keys & set(distilled)  # a rank scores for itself
        assert batch.distilled_tokens == sum(len(policy_positions(samples[key])) for key in distilled)
        assert batch.loss_scale == packed[0].loss_scale and batch.samples == tuple(samples)


@given(batches, st.integers(1, 3), all_rules)
@settings(deadline=None, max_examples=100)
def test_student_and_teacher_predict_the_same_ids_from_the_right_places(samples, data_size, rules):
    # METHOD §7 (f): whatever the prompt's length, the position before response token t predicts token t.
    for rank in range(data_size):
        for parts, prompt_of in rows_of_all(samples, rank, data_size, rules):
            ids, where = assemble(parts)
            starts = parts[0].cu_seqlens.tolist()
            found = {}  # (sample, t): how often some rank predicts it
            for part in parts:
                places, targets = part.predicts.tolist(), part.targets.tolist()
                assert len(places) == len(targets) == sum(part.target_counts)
                cursor = 0
                for sequence, share, start in zip(part.sequences, part.shares, starts, strict=False):
                    sample = samples[sequence.key]
                    prompt, response = prompt_of(sample), sample.response_ids
                    complete = (*prompt, *response)
                    assert sequence.length == len(prompt) + policy_positions(sample)[-1]
                    for t in policy_positions(sample)[share]:
                        place = where[places[cursor]]
                        assert targets[cursor] == response[t]
                        assert place - start == len(prompt) - 1 + t
                        # every id the model sees up to here, in this sequence, is the true context of token t
                        assert ids[start : place + 1] == list(complete[: len(prompt) + t])
                        found[sequence.key, t] = found.get((sequence.key, t), 0) + 1
                        cursor += 1
                assert cursor == len(places)
            assert found == {
                (sequence.key, t): 1
                for sequence in parts[0].sequences
                for t in policy_positions(samples[sequence.key])
            }


@given(batches, all_rules)
@settings(deadline=None, max_examples=60)
def test_context_parallel_ranks_hold_what_megatron_rotates(samples, rules):
    # Megatron's rotary embedding takes a rank's positions from the length of each sequence alone.
    import megatron_srpo.distributed.megatron  # noqa: F401  (first: it installs the CPU shim)

    # isort: split
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    for parts, _ in rows_of_all(samples, 0, 1, rules):
        for rank, part in enumerate(parts):
            bounds, size = part.cu_seqlens.tolist(), len(parts)
            lengths = [(end - start) // size for start, end in itertools.pairwise(bounds)]
            for length, positions in zip(lengths, part.positions.split(lengths), strict=True):
                rotated = _get_thd_freqs_on_this_cp_rank(
                    rank, size, torch.empty(length), torch.arange(part.max_seqlen)
                )
                assert positions.tolist() == rotated.tolist()


@given(st.integers(0, 40), st.integers(1, 8))
def test_shares_of_a_response(count, size):
    # In order, each token once, and no rank has more than one token more than another.
    shares = [range(count)[ContextParallel(rank, size).share(count)] for rank in range(size)]
    assert [token for share in shares for token in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(batches, st.integers(1, 3), all_rules)
@settings(deadline=None, max_examples=60)
def test_documents_are_bounded(samples, data_size, rules):
    # cu_seqlens divides the row into its sequences (and one of padding); positions restart at each.
    for rank in range(data_size):
        for row in pack(samples, rank, data_size, rules, "token_mean").micro_batches:
            bounds, size = row.cu_seqlens.tolist(), rules.context.size
            assert row.cu_seqlens.dtype == torch.int32
            assert (
                bounds[0] == 0
                and bounds[-1] == size * len(row.ids) == size * len(row.positions)
                and bounds == sorted(set(bounds))
            )
            lengths = [end - start for start, end in itertools.pairwise(bounds)]
            own = [padded(sequence, rules.context) for sequence in row.sequences]
            assert lengths[: len(own)] == own and len(lengths) - len(own) in (0, 1)
            assert row.max_seqlen == max(lengths)
            if size == 1:
                assert row.positions.tolist() == [place for length in lengths for place in range(length)]
                assert all(place < sum(own) for place in row.predicts.tolist())


@given(batches, st.integers(1, 3), all_rules)
@settings(deadline=None, max_examples=60)
def test_distilled_documents_come_first(samples, data_size, rules):
    for rank in range(data_size):
        batch = pack(samples, rank, data_size, rules, "token_mean")
        for row in batch.micro_batches:
            is_distilled = [samples[sequence.key].route.distillation_weight > 0 for sequence in row.sequences]
            assert is_distilled == sorted(is_distilled, reverse=True)
            assert row.distilled == sum(is_distilled)


@given(batches, st.integers(1, 3), all_rules, st.sampled_from(["token_mean", "seq_mean"]))
@settings(deadline=None, max_examples=60)
def test_terms_belong_to_their_tokens(samples, data_size, rules, aggregation):
    # Each response token has its own sample's numbers, the denominator included.
    routed = [sample for sample in samples if sample.route.branch != "none"]
    for rank in range(data_size):
        batch = pack(samples, rank, data_size, rules, aggregation)
        for row in batch.micro_batches:
            terms = batch.terms(row, torch.empty(0), None, torch.device("cpu"))
            assert terms.old_logprob is None and all(field.dtype == torch.float32 for field in terms[:4])
            expected = []
            for sequence in row.sequences:
                sample, route = samples[sequence.key], samples[sequence.key].route
                if aggregation == "token_mean":
                    denominator = sum(len(policy_positions(other)) for other in routed)
                else:
                    denominator = len(routed) * len(policy_positions(sample))
                for logprob in sample.logprobs[rules.context.share(len(sample.logprobs))]:
                    weights = [
                        weight / denominator if weight else 0.0
                        for weight in (route.policy_weight, route.distillation_weight)
                    ]
                    expected.append([route.advantage, *weights, logprob])
            found = torch.stack(terms[:4], dim=1)
            torch.testing.assert_close(found, torch.tensor(expected).view(-1, 4), rtol=1e-6, atol=0)


@given(batches, st.sampled_from(["token_mean", "seq_mean"]))
@settings(deadline=None, max_examples=100)
def test_loss_scales_sum_to_one_over_the_tokens(samples, aggregation):
    scales = loss_scales(samples, aggregation)
    total = sum(scale * len(policy_positions(sample)) for scale, sample in zip(scales, samples, strict=True))
    routed = [sample.route.branch != "none" for sample in samples]
    assert total == pytest.approx(1.0 if any(routed) else 0.0)
    assert [scale > 0 for scale in scales] == routed


def test_loss_scales_by_hand():
    # Distilled and all-wrong (advantage 0) samples share one denominator; samples without a route are not in
    # it.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 2, 5, 4), ("none", 2, 7, 1), ("grpo", 2, 2, 1))
    assert loss_scales(samples, "token_mean") == (0.1, 0.1, 0.0, 0.1)
    assert loss_scales(samples, "seq_mean") == pytest.approx((1 / 9, 1 / 15, 0.0, 1 / 6))


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_balance(costs, bins):
    contents = balance(costs, bins)
    assert len(contents) == bins and sorted(itertools.chain.from_iterable(contents)) == list(
        range(len(costs))
    )
    loads = [sum(costs[item] for item in items) for items in contents]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_row_by_hand():
    # Two sequences and padding, every number written out.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 1, 2, 4))
    batch = pack(samples, 0, 1, PackingRules(token_budget=20, length_multiple=8), "token_mean")
    (row,) = batch.micro_batches
    assert [sequence.key for sequence in row.sequences] == [1, 0]  # distilled first
    # sample 0: prompt 1 2, response 3 4 5. sample 1: its ids are drawn teacher first
    teacher, prompt, response = samples[1].route.teacher_ids, samples[1].prompt.ids, samples[1].response_ids
    assert row.ids.tolist() == [*prompt, response[0], 1, 2, 3, 4, 0, 0]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 2, 6, 8]
    assert row.predicts.tolist() == [0, 1, 3, 4, 5]
    assert row.targets.tolist() == [*response, 3, 4, 5]
    assert row.max_seqlen == 4
    (teacher_row,) = batch.teacher_micro_batches
    assert teacher_row.ids.tolist() == [*teacher, response[0], 0, 0, 0]
    assert teacher_row.predicts.tolist() == [3, 4]
    assert teacher_row.targets.tolist() == list(response)


def test_environment_tokens_are_fed_but_not_predicted():
    # Of a response a B C d E f (the policy writes lower case), all but f is fed; a, d, f are predicted.
    (sample,) = samples_of(("sdpo", 2, 6, 3, {1, 2, 4}))
    prompt, response, teacher = sample.prompt.ids, sample.response_ids, sample.route.teacher_ids
    batch = pack([sample], 0, 1, PackingRules(token_budget=20), "seq_mean")
    (row,), (teacher_row,) = batch.micro_batches, batch.teacher_micro_batches
    assert row.ids.tolist() == [*prompt, *response[:5]]
    assert teacher_row.ids.tolist() == [*teacher, *response[:5]]
    assert row.predicts.tolist() == [1, 4, 6] and teacher_row.predicts.tolist() == [2, 5, 7]
    assert row.targets.tolist() == teacher_row.targets.tolist() == [response[t] for t in (0, 3, 5)]
    assert batch.loss_scale == (1 / 3,) and batch.distilled_tokens == 3
    (cut,) = samples_of(("grpo", 2, 6, 1, {0, 4, 5}))
    (row,) = pack([cut], 0, 1, PackingRules(token_budget=20), "seq_mean").micro_batches
    assert row.ids.tolist() == [*cut.prompt.ids, *cut.response_ids[:3]]  # nothing after the last prediction
    assert row.predicts.tolist() == [2, 3, 4]


def test_row_by_hand_on_two_context_parallel_ranks():
    # The same two sequences, padded to 4 and 4 tokens, and padding; each rank's numbers written out.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 1, 2, 4))
    distilled, response = samples[1].prompt.ids[0], samples[1].response_ids
    for rank, ids, positions, predicts, targets in (
        (0, [distilled, 0, 1, 4, 0, 0], [0, 3, 0, 3, 0, 3], [0, 8], [response[0], 3]),
        (1, [response[0], 0, 2, 3, 0, 0], [1, 2, 1, 2, 1, 2], [6, 9, 3], [response[1], 4, 5]),
    ):
        rules = PackingRules(token_budget=20, length_multiple=3, context=ContextParallel(rank, 2))
        (row,) = pack(samples, 0, 1, rules, "token_mean").micro_batches
        assert row.cu_seqlens.tolist() == [0, 4, 8, 12] and row.max_seqlen == 4
        assert (row.ids.tolist(), row.positions.tolist()) == (ids, positions)
        assert (row.predicts.tolist(), row.targets.tolist()) == (predicts, targets)


def test_document_longer_than_the_budget_has_a_row_of_its_own():
    samples = samples_of(("grpo", 2, 3, 1), ("grpo", 30, 20, 1), ("grpo", 3, 3, 1))
    rows = pack(samples, 0, 1, PackingRules(token_budget=12), "token_mean").micro_batches
    assert sorted([sequence.key for sequence in row.sequences] for row in rows) == [[1], [2, 0]]
    assert sorted(len(row.ids) for row in rows) == [9, 49]


def test_ranks_with_nothing_to_do_still_take_part():
    # More ranks than samples: empty rows of one padding token, with nothing to predict and no terms.
    samples = samples_of(("sdpo", 2, 3, 5))
    idle = pack(samples, 1, 2, PackingRules(token_budget=50, length_multiple=4), "token_mean")
    for (row,) in (idle.micro_batches, idle.teacher_micro_batches):
        assert row.sequences == () and row.ids.tolist() == [0, 0, 0, 0] and row.cu_seqlens.tolist() == [0, 4]
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
        batch = pack(samples, rank, 3, PackingRules(token_budget=50, count_multiple=2), "token_mean")
        assert (
            batch.teacher_micro_batches == []
            and batch.distilled_tokens == 0
            and len(batch.micro_batches) == 2
        )


def test_expensive_samples_are_spread():
    # A distilled sample costs its teacher's forward pass too.
    distilled, plain = ("sdpo", 10, 10, 200), ("grpo", 10, 10, 1)
    samples = samples_of(distilled, plain, distilled, plain, plain, plain)
    for rank in range(2):
        batch = pack(samples, rank, 2, PackingRules(token_budget=1000), "token_mean")
        assert [len(rows[0].sequences) for rows in (batch.micro_batches, batch.teacher_micro_batches)] == [
            3,
            1,
        ]


def test_plan_is_deterministic():
    samples = samples_of(*[("sdpo", 3, 5, 9), ("grpo", 3, 5, 1)] * 4)
    plans = [pack(samples, 0, 2, PackingRules(token_budget=15), "token_mean").micro_batches for _ in range(2)]
    keys = [[[sequence.key for sequence in row.sequences] for row in plan] for plan in plans]
    assert keys[0] == keys[1] and len(keys[0]) > 1
