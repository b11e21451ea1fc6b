"""Make routed groups, and plan and build an optimizer batch of them as one data-parallel rank does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import chain

from hypothesis import strategies as st
from samples import make_sample

from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Group, Route, Sample
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.training.batch_plan import BatchPlan, OptimizerBatch, plan_batch
from megatron_srpo.training.packing import Family, MicroBatch, PackingRules, SequenceTokens, micro_batch


def plan(
    groups: Sequence[Group], data_size: int, rules: PackingRules, aggregation: str = "token_mean"
) -> BatchPlan:
    """Return the plan of the groups' outlines."""
    return plan_batch([outline(group) for group in groups], data_size, rules, aggregation)


def pack(
    groups: Sequence[Group], rank: int, data_size: int, rules: PackingRules, aggregation: str = "token_mean"
) -> OptimizerBatch:
    """Return the batch of data-parallel rank `rank`, which only has the samples that it needs."""
    planned = plan(groups, data_size, rules, aggregation)
    samples = dict(enumerate(chain.from_iterable(groups)))
    return planned.build(rank, {key: samples[key] for key in planned.keys[rank]})


def alone(samples: Sequence[Sample]) -> list[Group]:
    """Return each sample as a group of its own."""
    return [(sample,) for sample in samples]


def row_of(
    documents: Sequence[Sequence[int]], total: int, context: ContextParallel | None = None
) -> MicroBatch:
    """Return a row of `total` tokens; each document's first token is its prompt, the others its response."""
    tokens = {n: SequenceTokens(ids[:1], ids[1:], range(len(ids) - 1)) for n, ids in enumerate(documents)}
    families = [Family((one.sequence(number),)) for number, one in tokens.items()]
    return micro_batch(families, total, tokens, context or ContextParallel())


ROUTES = {  # branch -> (z^GRPO, z^SDPO)
    "grpo": (1.0, 0.0),
    "sdpo": (0.0, 1.0),
    "mixed": (0.9, 0.1),
    "none": (0.0, 0.0),
}


def routed_sample(
    number, branch, prompt, response_length, teacher, environment=(), index=0, flat=False, prompt_id="p"
):
    """Return sample `number`, whose response ids differ from each other and from every other sample's.

    environment: positions in the response that the policy did not write, never all. flat: advantage 0.
    """
    policy, distillation = ROUTES[branch]
    route = Route(
        branch=branch,
        policy_weight=policy,
        distillation_weight=distillation,
        advantage=0.0 if flat else (number + 1) / 7,
        teacher_ids=tuple(teacher) if distillation else None,
    )
    first = 1000 * number + 1
    return make_sample(
        index,
        prompt_id=prompt_id,
        prompt_ids=tuple(prompt),
        response_ids=range(first, first + response_length),
        logprobs=[-number - place / 100 for place in range(response_length)],
        route=route,
        environment=set(environment) - {response_length // 2},
    )


def policy_positions(sample):
    return [position for position, is_policy in enumerate(sample.loss_mask) if is_policy]


def samples_of(*rows):
    """Return samples of (branch, prompt length, response length, teacher's length, environment).

    No two have an id in common.
    """
    samples = []
    for number, (branch, prompt_length, response_length, teacher_length, *environment) in enumerate(rows):
        start = 1000 * number + 500
        prompt, teacher = (
            range(start + at, start + at + n) for at, n in ((0, prompt_length), (200, teacher_length))
        )
        samples.append(routed_sample(number, branch, prompt, response_length, teacher, *environment))
    return samples


def groups_of(*groups):
    """Return groups of (prompt length, teacher prompts' lengths, samples).

    A sample is (branch, response length, number of its teacher's prompt, environment, flat).
    """
    numbers = itertools.count()
    made = []
    for name, (prompt_length, teacher_lengths, samples) in enumerate(groups):
        ids = itertools.count(10**6 * (name + 1))
        prompt = tuple(itertools.islice(ids, prompt_length))
        teachers = [tuple(itertools.islice(ids, length)) for length in teacher_lengths]
        group = []
        for index, (branch, response_length, teacher, environment, flat) in enumerate(samples):
            teacher_ids = teachers[teacher % len(teachers)]
            rest = (environment, index, flat, f"p{name}")
            group.append(routed_sample(next(numbers), branch, prompt, response_length, teacher_ids, *rest))
        made.append(tuple(group))
    return made


def flattened(groups):
    return list(itertools.chain.from_iterable(groups))


one_sample = st.tuples(
    st.sampled_from(sorted(ROUTES)),
    st.integers(1, 20),
    st.integers(0, 1),
    st.sets(st.integers(0, 19)),
    st.sampled_from([False, False, True]),
)
batches = st.lists(
    st.tuples(
        st.integers(1, 30),
        st.lists(st.integers(1, 60), min_size=2, max_size=2),
        st.lists(one_sample, min_size=1, max_size=5),
    ),
    max_size=5,
).map(lambda groups: groups_of(*groups))
