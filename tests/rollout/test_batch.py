"""Test building a batch: rounds, filtering, and the carried groups with their staleness.

The engine is scripted, the rest real.
"""

from __future__ import annotations

from functools import partial

import pytest
from thread_ranks import on_ranks
from tiny import save_folder

from megatron_srpo.algorithm.routing import has_signal
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.batch import BatchBuilder
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import Completion
from megatron_srpo.rollout.ledger import Ledger, carried_groups, carried_text

ALONE = Layout()


class Engine:
    """Yield the requests in order, two tokens each, until stopped; the rest has one token by then."""

    version = "0"

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling, stop):
        for number, request in enumerate(requests):
            before = request.start or Completion([], [], [], "abort")
            self.asked.append((request.seed, len(before.ids)))
            new = (1 if stop.is_set() else 2) - min(len(before.ids), 1)
            span = (self.version, len(before.ids), len(before.ids) + new)
            ids = [*before.ids, *[7] * new]
            reason = "abort" if stop.is_set() else "stop"
            yield {number: Completion(ids, [-1.0] * len(ids), [*before.versions, span], reason)}


class Judge:
    """Give rewards by a script: prompt number → rewards of its samples in turn (default 1, 0, 1, 0, …)."""

    def __init__(self, script):
        self.script, self.turns = script, {}

    def verify(self, jobs):
        verdicts = []
        for job in jobs:
            number, turn = int(job.answer), self.turns.setdefault(job.answer, [0])
            reward = float(self.script.get(number, (1, 0))[turn[0] % len(self.script.get(number, (1, 0)))])
            turn[0] += 1
            verdicts.append(Verdict(reward=reward, correct=reward > 0, format_ok=True))
        return verdicts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return HFFolder(save_folder(tmp_path_factory.mktemp("builder")))


@pytest.fixture
def make(folder, tmp_path):
    """Return a function of (script, *overrides) that returns (builder, engine).

    A step has three prompts, two samples each.
    """

    def build(script=None, *overrides, layout=ALONE):
        config = tmp_path / f"config_{layout.rank}.yaml"
        config.write_text(
            f"model: {{hf_path: {folder.path}}}\nrollout: {{prompts_per_step: 3, samples_per_prompt: 2}}\n"
            f"train: {{steps: 9}}\nlogging: {{dir: {tmp_path / 'run'}}}\n"
        )
        config = load_config(config, list(overrides))
        engine = Engine()
        collector = Collector(Judge(script or {}), engine, folder, layout, config.rollout)
        (tmp_path / "ledger").mkdir(exist_ok=True)  # the first rank may be late
        ledger = Ledger(tmp_path / "ledger", layout, keeps_samples=True)
        useful = partial(has_signal, algorithm=config.algorithm, feedback=config.teacher.feedback)
        seed = config.train.seed
        return BatchBuilder(collector, prompt, ledger, config.rollout, seed, useful), engine

    return build


def prompt(number):
    return Prompt(
        id=f"p{number}", task="t", messages=({"role": "user", "content": str(number)},), answer=str(number)
    )


def names(groups):
    return [group[0].prompt.id for group in groups]


def prompts_asked(engine):
    """Return the prompts of the requests, each once, in order."""
    return list(dict.fromkeys(seed.split("/")[2] for seed, _ in engine.asked))


def test_without_selection_every_prompt_is_trained_in_order(make):
    builder, engine = make()
    assert [names(builder.build(step).groups) for step in (1, 2)] == [
        ["p0", "p1", "p2"],
        ["p3", "p4", "p5"],
    ]
    assert len(engine.asked) == 12 and builder.state_before(2)[0] == 3 and builder.state_before(3)[0] == 6


def test_groups_without_signal_are_left_out_and_others_are_sampled(make):
    builder, engine = make({1: (1, 1), 3: (0, 0)}, "rollout.dynamic_filtering=true")
    batch = builder.build(1)
    # a second round for one, a third because p3 has no signal either
    assert names(batch.groups) == ["p0", "p2", "p4"]
    assert batch.metrics == {"groups_filtered": 2, "groups_carried": 0, "samples_dropped": 0, "rounds": 3}
    assert prompts_asked(engine) == ["p0", "p1", "p2", "p3", "p4"]
    assert names(builder.build(2).groups) == ["p5", "p6", "p7"]


def test_after_enough_rounds_the_batch_is_filled(make):
    builder, _ = make(
        dict.fromkeys(range(1, 99), (1, 1)), "rollout.dynamic_filtering=true", "rollout.filter_rounds=2"
    )
    batch = builder.build(1)
    assert (
        names(batch.groups) == ["p0", "p1", "p2"]
        and batch.metrics["groups_filtered"] == 2
        and batch.metrics["rounds"] == 2
    )


def test_over_sampling_aborts_the_slowest_and_continues_them(make):
    # Six prompts are started for three places: the others have one token each, and continue with newer
    # weights.
    builder, engine = make(None, "rollout.over_sampling=2")
    assert names(builder.build(1).groups) == ["p0", "p1", "p2"]
    engine.version, engine.asked = "1", []
    batch = builder.build(2)
    assert names(batch.groups) == ["p3", "p4", "p5"] and engine.asked[:2] == [
        ("1/2/p3/0", 1),
        ("1/2/p3/1", 1),
    ]
    assert (
        batch.groups[0][0].versions == (("0", 0, 1), ("1", 1, 2))
        and len(batch.groups[0][0].response_ids) == 2
    )
    assert prompts_asked(engine) == ["p3", "p4", "p5", "p6", "p7", "p8"]  # three are carried, three are new
    trained = names(builder.build(3).groups)
    assert trained == ["p6", "p7", "p8"]


def test_what_is_too_stale_is_sampled_again(make):
    builder, engine = make(None, "rollout.over_sampling=2", "rollout.max_staleness=0")
    builder.build(1)
    engine.version, engine.asked = "1", []
    groups = builder.build(2).groups
    assert names(groups) == ["p3", "p4", "p5"] and engine.asked[0] == ("1/2/p3/0", 0)
    assert all(sample.versions == (("1", 0, 2),) for group in groups for sample in group)


def test_complete_groups_beyond_the_batch_are_carried(make):
    # When a round's last groups fill up the batch, the others are kept for the next step: they are not
    # sampled again.
    builder, engine = make(
        {0: (1, 1), 1: (1, 1)}, "rollout.dynamic_filtering=true", "rollout.over_sampling=1.6"
    )
    batch = builder.build(1)  # five begun: p0, p1 have no signal, p2 … p4 fill the batch
    assert names(batch.groups) == ["p2", "p3", "p4"] and batch.metrics["groups_carried"] == 0
    builder, engine = make({0: (1, 1)}, "rollout.dynamic_filtering=true", "rollout.over_sampling=1.6")
    batch = builder.build(1)
    assert names(batch.groups) == ["p1", "p2", "p3"] and batch.metrics["groups_carried"] == 1  # p4, aborted


def test_a_step_with_carried_groups_resumes_identically(make, tmp_path):
    # Resuming after step 1 with the saved cursor and carried groups gives the same second step.
    builder, engine = make(None, "rollout.over_sampling=2")
    builder.build(1)
    place, carried = builder.state_before(2)
    carried = carried_groups(carried_text(carried), "carried.jsonl")
    expected = builder.build(2).groups
    again, other = make(None, "rollout.over_sampling=2")
    (
        tmp_path / "ledger" / "step_000002.rank_00000.jsonl"
    ).unlink()  # its finished samples: this test is about the carried ones
    # A run of an older version leaves such a line.
    (tmp_path / "ledger" / "events.jsonl").write_text('{"event": "drawn"}\n')
    again.ledger.resume(1)
    again.resume(2, place, carried)
    assert again.build(2).groups == expected


def test_finished_samples_are_not_sampled_again(make):
    builder, _ = make()
    expected = builder.build(1).groups
    again, engine = make()
    again.resume(1, 0, [])
    assert again.build(1).groups == expected and engine.asked == []


def test_a_later_round_resumes_identically_on_several_ranks(make):
    # Rank 0 has enough and aborts p4, rank 1 finds nothing; p4 is finished in the second round, and has no
    # signal. Both ranks are killed after that round and resume: if p4 counted as complete in the first round,
    # the second would begin one prompt more.
    script, settings = (
        dict.fromkeys((1, 3, 4, 5), (1, 1)),
        ["rollout.dynamic_filtering=true", "rollout.over_sampling=1.5"],
    )

    def work(layout):
        builder, engine = make(script, *settings, layout=layout)
        builder.resume(1, 0, [])
        return builder.build(1), builder.state_before(2), engine.asked

    settings.append("rollout.prompts_per_step=4")
    first, second = (on_ranks(2, work) for _ in range(2))
    assert [names(batch.groups) for batch, *_ in first] == [["p0", "p6"], ["p2", "p7"]]
    assert first[0][0].metrics["rounds"] == 2
    for (batch, state, _), (again, other, asked) in zip(first, second, strict=True):
        assert (batch, state) == (again, other) and not asked  # nothing is left to sample


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_several_ranks_select_carry_and_continue_together(make, ranks):
    # A group that changes its rank keeps all its samples; the first rank has what is left over of all ranks,
    # and a run that resumes with it builds the same next step.
    script = {number: ((1, 1), (1, 0), (1, 0))[number % 3] for number in range(99)}
    settings = ["rollout.dynamic_filtering=true", "rollout.over_sampling=2.5", "rollout.prompts_per_step=4"]

    def work(layout):
        builder, engine = make(script, *settings, layout=layout)
        steps, states = [], []
        for step in (1, 2, 3):
            engine.version = str(step - 1)
            states.append(builder.state_before(step))
            steps.append(builder.build(step))
        return steps, [*states, builder.state_before(4)]

    found = on_ranks(ranks, work)
    for number in range(3):
        batches = [steps[number] for steps, _ in found]
        trained = [batches[place % ranks].groups[place // ranks] for place in range(4)]
        assert len(set(names(trained))) == 4 and sum(len(batch.groups) for batch in batches) == 4
        assert all([sample.judged.correct for sample in group] == [True, False] for group in trained)
        assert all(batch.metrics == batches[0].metrics for batch in batches)
        first, *others = [states[number + 1] for _, states in found]
        assert len(first[1]) == batches[0].metrics["groups_carried"]
        for rank, (next_prompt, carried) in enumerate(others, 1):
            assert next_prompt == first[0] and carried == first[1][rank::ranks]
    saved = found[0][1][2]
    assert saved[1]

    def resume(layout):
        builder, engine = make(script, *settings, layout=layout)
        engine.version = "2"
        builder.resume(3, *saved)
        return builder.build(3)

    assert on_ranks(ranks, resume) == [steps[2] for steps, _ in found]


def test_a_prompt_that_has_changed_is_sampled_again(make, monkeypatch):
    builder, _ = make()
    builder.build(1)
    again, engine = make()
    again.prompt = lambda number: prompt(number).model_copy(update={"answer": str(number + 1)})
    again.resume(1, 0, [])
    again.build(1)
    assert len(engine.asked) == 6


def test_what_is_carried_may_hold_any_character(make, tmp_path):
    # Also those at which Python's splitlines would split: JSON leaves them as they are.
    builder, _ = make(None, "rollout.over_sampling=2")
    builder.build(1)
    one, *_ = builder.state_before(2)[1]
    strange = one.samples[0].model_copy(update={"text": "a\u2028b\u2029c\x85d\x0ce"})
    text = carried_text([one.model_copy(update={"samples": (strange,)})])
    assert carried_groups(text, "carried.jsonl")[0].samples == (strange,)
    with pytest.raises(ConfigError, match=r"carried.jsonl:1: is damaged"):
        carried_groups(text.replace('"index"', '"indey"'), "carried.jsonl")


def test_flipped_bits_of_the_ledger_are_not_trained_on(make, tmp_path):
    # Row: not covered by checksums (ledger). A flip leaves valid JSON, so only a checksum can tell.
    builder, _ = make()
    expected = builder.build(1).groups
    file = tmp_path / "ledger" / "step_000001.rank_00000.jsonl"
    intact = file.read_text()
    changed = [('"logprobs":[-1.0', '"logprobs":[-3.0'), ('"round":1', '"round":0'), ("crc32", "crc33")]
    for old, new in changed:
        assert old in intact, intact
        file.write_text(intact.replace(old, new, 1))
        again, engine = make()
        again.resume(1, 0, [])
        assert again.build(1).groups == expected and len(engine.asked) > 0
