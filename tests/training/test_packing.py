"""Test packing: no sample is lost, and every position predicts its own target.

Every rank has the same number of micro-batches.
"""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import alone, batches, flattened, groups_of, pack, plan, policy_positions, samples_of

from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.training.batch_plan import SCORED
from megatron_srpo.training.packing import PackingRules

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


def multiple_of(rules):
    """Return the divisor of a row's length.

    Transformer Engine needs a multiple of twice the context-parallel ranks for each document.
    """
    size = rules.context.size
    return size * (math.lcm(2, rules.length_multiple) if size > 1 else rules.length_multiple)


def all_parts(batches_of_ranks, name):
    """Return the rows as their parts on the context-parallel ranks."""
    return zip(*(getattr(batch, name) for batch in batches_of_ranks), strict=True)


def rows_of_all(groups, rank, data_size, rules):
    """Return each row of a data-parallel rank: trained, scored and the teacher's.

    A row is (its parts on the context-parallel ranks, prompt ids by sample).
    """
    size = rules.context.size
    everyone = [rules._replace(context=ContextParallel(number, size)) for number in range(size)]
    packed = [pack(groups, rank, data_size, own) for own in everyone]
    for name, prompt_of in (
        ("micro_batches", lambda sample: sample.prompt.ids),
        ("scored_micro_batches", lambda sample: sample.prompt.ids),
        ("teacher_micro_batches", lambda sample: sample.route.teacher_ids),
    ):
        yield from ((parts, prompt_of) for parts in all_parts(packed, name))


def documents_of(row):
    """Return (start, end, number of tokens before it in its sequences) of each document."""
    bounds, prefixes = row.documents
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    before = [0 if prefix < 0 else lengths[prefix] for prefix in prefixes]
    return [(start, end, skip) for (start, end), skip in zip(itertools.pairwise(bounds), before, strict=True)]


def assemble(parts):
    """Return (ids of the complete row, the place in it of each token of the ranks' parts).

    The parts come one after another; places are by their positions.
    """
    documents = documents_of(parts[0])
    starts = [start - before for start, end, before in documents for _ in range((end - start) // len(parts))]
    where = [
        start + position
        for part in parts
        for start, position in zip(starts, part.positions.tolist(), strict=True)
    ]
    assert sorted(where) == list(range(parts[0].total))
    ids = dict(zip(where, torch.cat([part.ids for part in parts]).tolist(), strict=True))
    return [ids[place] for place in range(len(where))], where


@given(batches, st.integers(1, 4), all_rules)
@settings(deadline=None, max_examples=200)
def test_invariants(groups, data_size, rules):
    samples = flattened(groups)
    planned = plan(groups, data_size, rules)
    packed = [pack(groups, rank, data_size, rules) for rank in range(data_size)]
    silent = [
        key
        for key, sample in enumerate(samples)
        if not sample.route.distillation_weight and not sample.route.policy_weight * sample.route.advantage
    ]
    trained = [key for key in range(len(samples)) if key not in silent]
    distilled = [key for key, sample in enumerate(samples) if sample.route.distillation_weight > 0]
    for part, keys in (
        ("micro_batches", trained),
        ("teacher_micro_batches", distilled),
        ("scored_micro_batches", silent[::SCORED]),
    ):
        of_rank = [getattr(batch, part) for batch in packed]
        found = [sequence.key for rows in of_rank for row in rows for sequence in row.sequences]
        assert sorted(found) == keys  # every sample exactly once
        assert len({len(rows) for rows in of_rank}) == 1  # the same number on every rank
        assert (len(of_rank[0]) > 0) == (len(keys) > 0) and len(of_rank[0]) % rules.count_multiple == 0
        check_lengths(of_rank, rules)
    for batch, keys in zip(packed, planned.keys, strict=True):
        student_keys = {sequence.key for row in batch.micro_batches for sequence in row.sequences}
        teacher_keys = {sequence.key for row in batch.teacher_micro_batches for sequence in row.sequences}
        scored_keys = {sequence.key for row in batch.scored_micro_batches for sequence in row.sequences}
        assert teacher_keys == student_keys & set(distilled)  # a rank scores for itself
        assert batch.distilled_tokens == sum(len(policy_positions(samples[key])) for key in distilled)
        assert batch.loss_scale == packed[0].loss_scale
        assert sorted(batch.samples) == keys == sorted(student_keys | scored_keys)
        assert all(batch.samples[key] == samples[key] for key in keys)


def check_lengths(of_rank, rules):
    """Assert that rows keep to the budget, and have the lengths that the rules require."""
    multiple = multiple_of(rules)
    for rows in of_rank:
        lengths = []
        for row in rows:
            bounds, prefixes = row.documents
            documents = len(row.sequences) + len(set(prefixes) - {-1})  # without padding
            assert len(prefixes) - documents in (0, 1)
            lengths.append(bounds[documents])
            assert lengths[-1] <= rules.token_budget or len(row.sequences) == 1  # an over-long one is alone
            assert len(row.ids) * rules.context.size == row.total and row.total % multiple == 0
            if not rules.uniform:
                assert row.total == rounded(max(lengths[-1], 1), multiple)
        if rules.uniform and rows:
            assert {row.total for row in rows} == {rounded(max(*lengths, 1), multiple)}


@given(batches, st.integers(1, 3), all_rules)
@settings(deadline=None, max_examples=100)
def test_student_and_teacher_predict_the_same_ids_from_the_right_places(groups, data_size, rules):
    # METHOD §7 (f): whatever the prompt's length, the position before response token t predicts token t; a
    # prompt that several responses share is their true context, too.
    samples = flattened(groups)
    for rank in range(data_size):
        for parts, prompt_of in rows_of_all(groups, rank, data_size, rules):
            ids, where = assemble(parts)
            documents = documents_of(parts[0])
            prefixes = parts[0].documents.prefixes
            found = {}  # (sample, t): how often some rank predicts it
            for part in parts:
                places, targets = part.predicts.tolist(), part.targets.tolist()
                assert len(places) == len(targets) == sum(part.target_counts)
                cursor = 0
                for sequence, share in zip(part.sequences, part.shares, strict=True):
                    sample = samples[sequence.key]
                    prompt, response = prompt_of(sample), sample.response_ids
                    complete = (*prompt, *response)
                    assert sequence.length == len(prompt) + policy_positions(sample)[-1]
                    for t in policy_positions(sample)[share]:
                        place = where[places[cursor]]
                        assert targets[cursor] == response[t]
                        number = next(
                            n for n, (start, end, _) in enumerate(documents) if start <= place < end
                        )
                        shared = parts[0].documents.range(prefixes[number])
                        context = [ids[row] for row in shared] + ids[documents[number][0] : place + 1]
                        # every id the model sees up to here is the true context of token t
                        assert context == list(complete[: len(prompt) + t])
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
def test_context_parallel_ranks_hold_what_megatron_rotates(groups, rules):
    # Megatron's rotary embedding takes a rank's positions from the length of each document alone, as
    # Transformer Engine's layers do, which share no prompts.
    import megatron_srpo.distributed.megatron  # noqa: F401  (first: it installs the CPU shim)

    # isort: split
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    for parts, _ in rows_of_all(groups, 0, 1, rules._replace(shares_prompts=False)):
        for rank, part in enumerate(parts):
            assert set(part.documents.prefixes) == {-1}
            size = len(parts)
            lengths = [(end - start) // size for start, end, _ in documents_of(part)]
            for length, positions in zip(lengths, part.positions.split(lengths), strict=True):
                rotated = _get_thd_freqs_on_this_cp_rank(
                    rank, size, torch.empty(length), torch.arange(part.total)
                )
                assert positions.tolist() == rotated.tolist()


def test_a_prompt_is_computed_once():
    # Four responses of 4 tokens after a prompt of 11: the prompt's first 10 tokens once, then 1 + 3 of each.
    samples = [("grpo", 4, 0, (), False)] * 4
    (group,) = groups_of((11, (5,), samples))
    (row,) = pack([group], 0, 1, PackingRules(token_budget=100)).micro_batches
    assert row.documents.bounds == (0, 10, 14, 18, 22, 26) and row.documents.prefixes == (-1, 0, 0, 0, 0)
    assert row.positions.tolist() == [*range(10), *[10, 11, 12, 13] * 4]
    rows = pack([group], 0, 1, PackingRules(token_budget=18)).micro_batches  # two responses in each
    assert [row.documents.bounds for row in rows] == [(0, 10, 14, 18)] * 2
    (row,) = pack([group], 0, 1, PackingRules(100, shares_prompts=False)).micro_batches
    assert row.documents.bounds == (0, 14, 28, 42, 56)
    rules = PackingRules(100, context=ContextParallel(0, 2))  # documents are multiples of 4 tokens
    (row,) = pack([group], 0, 1, rules).micro_batches
    assert row.documents.bounds == (0, 8, 16, 24, 32, 40)


def test_a_teachers_prompt_is_computed_once_for_those_who_see_the_same_demonstration():
    samples = [("sdpo", 4, teacher, (), False) for teacher in (0, 0, 1, 0)]
    (group,) = groups_of((3, (20, 30), samples))
    (row,) = pack([group], 0, 1, PackingRules(token_budget=1000)).teacher_micro_batches
    assert row.documents.bounds == (0, 33, 52, 56, 60, 64) and row.documents.prefixes == (-1, -1, 1, 1, 1)
    assert row.total == 19 + 3 * 4 + 30 + 3


def test_short_prompts_of_long_responses_are_not_shared():
    (group,) = groups_of((4, (5,), [("grpo", 100, 0, (), False)] * 3))
    (row,) = pack([group], 0, 1, PackingRules(token_budget=1000)).micro_batches
    assert set(row.documents.prefixes) == {-1}


@given(st.integers(0, 40), st.integers(1, 8))
def test_shares_of_a_response(count, size):
    # In order, each token once, and no rank has more than one token more than another.
    shares = [range(count)[ContextParallel(rank, size).share(count)] for rank in range(size)]
    assert [token for share in shares for token in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(batches, st.integers(1, 3), all_rules)
@settings(deadline=None, max_examples=60)
def test_distilled_documents_come_first(groups, data_size, rules):
    samples = flattened(groups)
    for rank in range(data_size):
        batch = pack(groups, rank, data_size, rules)
        for row in batch.micro_batches:
            is_distilled = [samples[sequence.key].route.distillation_weight > 0 for sequence in row.sequences]
            assert is_distilled == sorted(is_distilled, reverse=True)
            assert row.distilled == sum(is_distilled)


@given(batches, st.integers(1, 3), all_rules, st.sampled_from(["token_mean", "seq_mean"]))
@settings(deadline=None, max_examples=60)
def test_terms_belong_to_their_tokens(groups, data_size, rules, aggregation):
    # Each response token has its own sample's numbers, the denominator included.
    samples = flattened(groups)
    routed = [sample for sample in samples if sample.route.branch != "none"]
    for rank in range(data_size):
        batch = pack(groups, rank, data_size, rules, aggregation)
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


def test_row_by_hand():
    # Two sequences and padding, every number written out.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 1, 2, 4))
    batch = pack(alone(samples), 0, 1, PackingRules(token_budget=20, length_multiple=8))
    (row,) = batch.micro_batches
    assert [sequence.key for sequence in row.sequences] == [1, 0]  # distilled first
    # sample 0: prompt 500 501, response 1 2 3
    teacher, prompt, response = samples[1].route.teacher_ids, samples[1].prompt.ids, samples[1].response_ids
    assert row.ids.tolist() == [500, 501, 1, 2, *prompt, response[0], 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert row.documents == ((0, 4, 6, 8), (-1, -1, -1))
    assert row.predicts.tolist() == [4, 5, 1, 2, 3]
    assert row.targets.tolist() == [*response, 1, 2, 3]
    (teacher_row,) = batch.teacher_micro_batches
    assert teacher_row.ids.tolist() == [*teacher, response[0], 0, 0, 0]
    assert teacher_row.predicts.tolist() == [3, 4]
    assert teacher_row.targets.tolist() == list(response)


def test_environment_tokens_are_fed_but_not_predicted():
    # Of a response a B C d E f (the policy writes lower case), all but f is fed; a, d, f are predicted.
    (sample,) = samples_of(("sdpo", 2, 6, 3, {1, 2, 4}))
    prompt, response, teacher = sample.prompt.ids, sample.response_ids, sample.route.teacher_ids
    batch = pack([(sample,)], 0, 1, PackingRules(token_budget=20), "seq_mean")
    (row,), (teacher_row,) = batch.micro_batches, batch.teacher_micro_batches
    assert row.ids.tolist() == [*prompt, *response[:5]]
    assert teacher_row.ids.tolist() == [*teacher, *response[:5]]
    assert row.predicts.tolist() == [1, 4, 6] and teacher_row.predicts.tolist() == [2, 5, 7]
    assert row.targets.tolist() == teacher_row.targets.tolist() == [response[t] for t in (0, 3, 5)]
    assert batch.loss_scale == (1 / 3,) and batch.distilled_tokens == 3
    (cut,) = samples_of(("grpo", 2, 6, 1, {0, 4, 5}))
    (row,) = pack([(cut,)], 0, 1, PackingRules(token_budget=20), "seq_mean").micro_batches
    assert row.ids.tolist() == [*cut.prompt.ids, *cut.response_ids[:3]]  # nothing after the last prediction
    assert row.predicts.tolist() == [2, 3, 4]


def test_row_by_hand_on_two_context_parallel_ranks():
    # The same two sequences, padded to 4 and 4 tokens, and padding; each rank's numbers written out.
    samples = samples_of(("grpo", 2, 3, 1), ("sdpo", 1, 2, 4))
    distilled, response = samples[1].prompt.ids[0], samples[1].response_ids
    for rank, ids, positions, predicts, targets in (
        (0, [500, 2, distilled, 0, 0, 0], [0, 3, 0, 3, 0, 3], [2, 6], [response[0], 1]),
        (1, [501, 1, response[0], 0, 0, 0], [1, 2, 1, 2, 1, 2], [8, 7, 1], [response[1], 2, 3]),
    ):
        rules = PackingRules(token_budget=20, length_multiple=3, context=ContextParallel(rank, 2))
        (row,) = pack(alone(samples), 0, 1, rules).micro_batches
        assert row.documents.bounds == (0, 4, 8, 12)
        assert (row.ids.tolist(), row.positions.tolist()) == (ids, positions)
        assert (row.predicts.tolist(), row.targets.tolist()) == (predicts, targets)


def test_document_longer_than_the_budget_has_a_row_of_its_own():
    samples = samples_of(("grpo", 2, 3, 1), ("grpo", 30, 20, 1), ("grpo", 3, 3, 1))
    rows = pack(alone(samples), 0, 1, PackingRules(token_budget=12)).micro_batches
    assert sorted([sequence.key for sequence in row.sequences] for row in rows) == [[1], [2, 0]]
    assert sorted(len(row.ids) for row in rows) == [9, 49]
