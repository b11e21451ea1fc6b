"""Test that over-sampling does not change which responses are trained: long ones are as frequent as without.

A simulated server decodes one token of every response in flight at a time, so short responses finish first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest

from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.rollout.batch import BatchBuilder
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import EMPTY, Completion
from megatron_srpo.rollout.ledger import Ledger

ALONE = Layout()
FOLDER = SimpleNamespace(
    encode=lambda messages, thinking: (1,),
    stop_ids=(2,),
    decode=lambda ids, prompt_ids: "",
)
LONG, LONG_SHARE = 24, 0.034
PROMPTS = 20_000


def drawn_length(seed):
    """Return the number of tokens of a response: 1 to 4, or `LONG`."""
    draw = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little") / 2**64
    return LONG if draw < LONG_SHARE else 1 + int(draw * 1e6) % 4


class Engine:
    """Give each sample a length, drawn again for each first token, and decode all requests in step."""

    version = "0"

    def __init__(self):
        self.starts = Counter()
        self.lengths = {}

    def generate(self, requests, sampling, stop):
        ends = {}  # time → requests that end then
        for number, request in enumerate(requests):
            done = len((request.start or EMPTY).ids)
            ends.setdefault(self._length(request, done) - done, []).append(number)
        now = 0
        for now in sorted(ends):
            yield {number: self._completion(requests[number], now, "stop") for number in ends.pop(now)}
            if stop.is_set():
                break
        for numbers in ends.values():
            yield {number: self._completion(requests[number], now, "abort") for number in numbers}

    def _length(self, request, done):
        key = request.seed.split("/", 2)[2]  # without the step: "prompt/index"
        if not done:
            self.starts[key] += 1
            self.lengths[key] = drawn_length(f"{key}/{self.starts[key]}")
        return self.lengths[key]

    def _completion(self, request, new, reason):
        start = request.start or EMPTY
        end = len(start.ids) + new
        versions = [*start.versions, (self.version, len(start.ids), end)]
        return Completion([7] * end, [-1.0] * end, versions, reason)


RIGHT = Verdict(reward=1.0, correct=True, format_ok=True)


def train(tmp_path, prompts=PROMPTS, size=1, **settings):
    """Return the trained samples, and the rows of metrics, of steps with 32 prompts."""
    rollout = RolloutSection(prompts_per_step=32, samples_per_prompt=size, **settings)
    engine = Engine()
    judge = SimpleNamespace(verify=lambda jobs: [RIGHT] * len(jobs))
    collector = Collector(judge, engine, FOLDER, ALONE, rollout)

    def prompt(number):
        return Prompt(id=str(number), task="t", messages=({"role": "user", "content": "?"},), answer="")

    ledger = Ledger(tmp_path / "ledger", ALONE, keeps_samples=False)
    builder = BatchBuilder(collector, prompt, ledger, rollout, 1, lambda group: True)
    trained, rows = [], []
    for step in range(1, prompts // 32 + 1):
        engine.version = str(max(0, step - 1 - rollout.async_steps))
        batch = builder.build(step)
        trained += [sample for group in batch.groups for sample in group]
        rows.append(batch.metrics)
    return trained, rows


def interval(prompts, size):
    """Return the share of long responses without over-sampling, and half the width of its 95 % interval."""
    seeds = [f"{number}/{index}/1" for number in range(prompts) for index in range(size)]
    share = sum(drawn_length(seed) == LONG for seed in seeds) / len(seeds)
    return share, 1.96 * (share * (1 - share) / len(seeds)) ** 0.5


def long_share(trained):
    return sum(sample.policy_tokens == LONG for sample in trained) / len(trained)


@pytest.mark.parametrize("over_sampling", [1.5, 2.0])
def test_over_sampling_trains_as_many_long_responses_as_without(over_sampling, tmp_path):
    # Over-sampling biased against long responses: 3.4 % of them became 0.8 % at 1.5, and none at 2.0.
    trained, rows = train(tmp_path, over_sampling=over_sampling)
    share, error = interval(PROMPTS, 1)
    assert abs(long_share(trained) - share) < error
    assert sum(row["samples_dropped"] for row in rows) == 0
    assert {len(sample.versions) for sample in trained} == {1, 2}  # some are continued, by one step


@pytest.mark.parametrize(
    "settings",
    [
        {"over_sampling": 2.0, "max_staleness": 0},
        {"over_sampling": 3.0, "max_staleness": 1},
        {"over_sampling": 3.0, "max_staleness": 2},
        {"over_sampling": 2.0, "max_staleness": 2, "async_steps": 1},
        {"over_sampling": 1.5, "max_staleness": 1, "async_steps": 1},
    ],
    ids=str,
)
def test_other_settings_are_unbiased_too(settings, tmp_path):
    # What is discarded is discarded for its place in the order, after all were finished, and it is counted.
    trained, rows = train(tmp_path, 3200, 2, **settings)
    share, error = interval(3200, 2)
    assert abs(long_share(trained) - share) < error
    keeps = settings["max_staleness"] - settings.get("async_steps", 0)
    assert (sum(row["samples_dropped"] for row in rows) > 0) == (settings["over_sampling"] > 1 + keeps)
