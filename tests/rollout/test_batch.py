"""Drawing a batch: rounds, what is left out, what is carried on and how stale it may be.

The engine is scripted, the rest real.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from tiny import save_folder

from megatron_srpo.config.load import load_config
from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.batch import Drawing
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import Completion
from megatron_srpo.rollout.ledger import Ledger, history

ALONE = SimpleNamespace(rank=0, world_size=1, gather_bytes=lambda mine, background=False: [mine])


class Engine:
    """Hands over the requests in order, two tokens each, until it is told "enough"; the rest has one token
    by then.
    """

    version = "0"

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling, finished):
        enough = False
        for number, request in enumerate(requests):
            before = request.start or Completion([], [], [], "abort")
            self.asked.append((request.seed, len(before.ids)))
            new = (1 if enough else 2) - min(len(before.ids), 1)
            span = (self.version, len(before.ids), len(before.ids) + new)
            ids = [*before.ids, *[7] * new]
            done = Completion(ids, [-1.0] * len(ids), [*before.versions, span], "abort" if enough else "stop")
            enough |= finished({number: done})


class Judge:
    """Rewards by a script, prompt number → rewards of its samples in turn; default 1, 0, 1, 0 …"""

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
    return HFFolder(save_folder(tmp_path_factory.mktemp("drawing")))


@pytest.fixture
def make(folder, tmp_path):
    """make(script, *overrides) → (drawing, engine): three prompts a step, two samples each."""

    def drawing(script=None, *overrides, layout=ALONE):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"model: {{hf_path: {folder.path}}}\nrollout: {{prompts_per_step: 3, samples_per_prompt: 2}}\n"
            f"train: {{steps: 9}}\nlogging: {{dir: {tmp_path / 'run'}}}\n"
        )
        config = load_config(config, list(overrides))
        engine = Engine()
        collector = Collector(Judge(script or {}), engine, folder, layout, config.rollout)
        ledger = Ledger(tmp_path / "ledger", layout, keeps_samples=True)
        return Drawing(config, collector, prompt, ledger, layout), engine

    return drawing


def prompt(number):
    return Prompt(
        id=f"p{number}", task="t", messages=({"role": "user", "content": str(number)},), answer=str(number)
    )


def names(groups):
    return [group[0].prompt.id for group in groups]


def events(tmp_path):
    return history((tmp_path / "ledger" / "events.jsonl").read_text().splitlines())


def test_without_choice_every_prompt_is_trained_in_order(make, tmp_path):
    drawing, engine = make()
    assert [names(drawing.draw(step, "0").groups) for step in (1, 2)] == [
        ["p0", "p1", "p2"],
        ["p3", "p4", "p5"],
    ]
    assert len(engine.asked) == 12 and drawing.place(2) == 3 and drawing.place(3) == 6
    assert events(tmp_path)[2]["drawn"] == ["p3", "p4", "p5"]


def test_groups_without_signal_are_left_out_and_others_drawn(make, tmp_path):
    drawing, _ = make({1: (1, 1), 3: (0, 0)}, "rollout.dynamic_filtering=true")
    drawn = drawing.draw(1, "0")
    assert names(drawn.groups) == [
        "p0",
        "p2",
        "p4",
    ]  # a second round for one, a third because p3 says nothing either
    assert drawn.numbers == {"groups_filtered": 2, "groups_carried": 0, "rounds": 3}
    assert events(tmp_path)[1] == {
        "drawn": ["p0", "p1", "p2", "p3", "p4"],
        "filtered": ["p1", "p3"],
        "trained": [],
    }
    assert names(drawing.draw(2, "0").groups) == ["p5", "p6", "p7"]


def test_after_enough_rounds_the_batch_is_filled(make):
    drawing, _ = make(
        dict.fromkeys(range(1, 99), (1, 1)), "rollout.dynamic_filtering=true", "rollout.filter_rounds=2"
    )
    drawn = drawing.draw(1, "0")
    assert (
        names(drawn.groups) == ["p0", "p1", "p2"]
        and drawn.numbers["groups_filtered"] == 2
        and drawn.numbers["rounds"] == 2
    )


def test_over_sampling_breaks_off_the_slowest_and_goes_on_with_them(make, tmp_path):
    """Six prompts begun, three wanted: the others have one token each, and go on from it by newer weights."""
    drawing, engine = make(None, "rollout.over_sampling=2")
    assert names(drawing.draw(1, "0").groups) == ["p0", "p1", "p2"]
    engine.version, engine.asked = "1", []
    drawn = drawing.draw(2, "1")
    assert names(drawn.groups) == ["p3", "p4", "p5"] and engine.asked[:2] == [
        ("1/2/p3/0", 1),
        ("1/2/p3/1", 1),
    ]
    assert (
        drawn.groups[0][0].versions == (("0", 0, 1), ("1", 1, 2))
        and len(drawn.groups[0][0].response_ids) == 2
    )
    assert events(tmp_path)[2]["drawn"] == [
        "p6",
        "p7",
        "p8",
    ]  # three were carried on, so three more are begun
    trained = names(drawing.draw(3, "2").groups)
    assert trained == ["p6", "p7", "p8"]


def test_what_is_too_stale_is_made_anew(make):
    drawing, engine = make(None, "rollout.over_sampling=2", "rollout.max_staleness=0")
    drawing.draw(1, "0")
    engine.version, engine.asked = "1", []
    groups = drawing.draw(2, "1").groups
    assert names(groups) == ["p3", "p4", "p5"] and engine.asked[0] == ("1/2/p3/0", 0)
    assert all(sample.versions == (("1", 0, 2),) for group in groups for sample in group)


def test_whole_groups_beyond_the_batch_are_carried(make):
    """A batch that fills up with a round's last groups leaves the others for the next step: they are not
    sampled again.
    """
    drawing, engine = make(
        {0: (1, 1), 1: (1, 1)}, "rollout.dynamic_filtering=true", "rollout.over_sampling=1.6"
    )
    drawn = drawing.draw(1, "0")  # five begun: p0, p1 say nothing, p2 … p4 fill the batch
    assert names(drawn.groups) == ["p2", "p3", "p4"] and drawn.numbers["groups_carried"] == 0
    drawing, engine = make({0: (1, 1)}, "rollout.dynamic_filtering=true", "rollout.over_sampling=1.6")
    drawn = drawing.draw(1, "0")
    assert (
        names(drawn.groups) == ["p1", "p2", "p3"] and drawn.numbers["groups_carried"] == 1
    )  # p4, broken off


def test_a_step_that_was_carried_into_goes_on_alike(make, tmp_path):
    """Going on after step 1 with the place and what the ledger says was carried gives the same second step."""
    drawing, engine = make(None, "rollout.over_sampling=2")
    drawing.draw(1, "0")
    place = drawing.place(2)
    expected = drawing.draw(2, "1").groups
    again, other = make(None, "rollout.over_sampling=2")
    (
        tmp_path / "ledger" / "step_000002.rank_00000.jsonl"
    ).unlink()  # what was finished of it: here the test is of the carried
    again.go_on(2, place)
    assert again.draw(2, "1").groups == expected


def test_finished_samples_are_not_made_again(make):
    drawing, _ = make()
    expected = drawing.draw(1, "0").groups
    again, engine = make()
    again.go_on(1, 0)
    assert again.draw(1, "0").groups == expected and engine.asked == []


def gather(meeting, shown, rank, mine, background):
    """Between two threads that stand for two ranks."""
    shown[rank] = mine
    meeting.wait()
    everyone = [*shown]
    meeting.wait()
    return everyone


def test_a_later_round_of_several_ranks_goes_on_alike(make):
    """Rank 0 has enough and breaks p4 off, rank 1 finds nothing; p4 is finished in the second round, and says
    nothing.

    Killed after that round, both go on: were p4 taken for whole in the first round, the second would begin
    one prompt more.
    """
    script, settings = (
        dict.fromkeys((1, 3, 4, 5), (1, 1)),
        ["rollout.dynamic_filtering=true", "rollout.over_sampling=1.5"],
    )
    results = []
    for _ in range(2):
        meeting, shown, made = threading.Barrier(2, timeout=20), [b"", b""], []
        for rank in range(2):
            layout = SimpleNamespace(
                rank=rank, world_size=2, gather_bytes=partial(gather, meeting, shown, rank)
            )
            made.append(make(script, *settings, "rollout.prompts_per_step=4", layout=layout))
            made[-1][0].go_on(1, 0)
        with ThreadPoolExecutor(2) as ranks:
            drawn = list(ranks.map(lambda both: both[0].draw(1, "0"), made))
        left = [(drawing.next_prompt, drawing._carried, engine.asked) for drawing, engine in made]
        results.append([(one, *rest) for one, rest in zip(drawn, left, strict=True)])
    first, second = results
    assert [names(drawn.groups) for drawn, *_ in first] == [["p0", "p6"], ["p2", "p7"]]
    assert first[0][0].numbers["rounds"] == 2
    for (drawn, *rest, _), (again, *other, asked) in zip(first, second, strict=True):
        assert (drawn.groups, drawn.numbers, rest) == (
            again.groups,
            again.numbers,
            other,
        ) and not asked  # nothing was left to sample


def test_a_prompt_that_has_changed_is_sampled_anew(make, monkeypatch):
    drawing, _ = make()
    drawing.draw(1, "0")
    again, engine = make()
    again.prompt = lambda number: prompt(number).model_copy(update={"answer": str(number + 1)})
    again.go_on(1, 0)
    again.draw(1, "0")
    assert len(engine.asked) == 6


def test_what_is_carried_may_hold_any_character(make, tmp_path):
    """Also those at which Python's splitlines would cut: JSON leaves them as they are."""
    drawing, _ = make(None, "rollout.over_sampling=2")
    drawing.draw(1, "0")
    (one, *_), ledger = drawing.ledger.carried(2), drawing.ledger
    strange = one.samples[0].model_copy(update={"text": "a\u2028b\u2029c\x85d\x0ce"})
    ledger.carry(2, [one.model_copy(update={"samples": (strange,)})])
    assert ledger.carried(2)[0].samples == (strange,)
