"""The groups a step trains on: prompts drawn, sampled and verified in rounds until the batch is full.

A round is the same on every rank but for the share of its prompts each rank samples. Without over-sampling
and filtering there is one, and ranks need not talk. With them, each rank breaks off when it has its share of
what is wanted, ranks show each other what they have, and another round follows if that is not enough. What is
left over (whole groups, and responses broken off) is carried into the next step, and goes on there unless it
is too stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_srpo.algorithm.routing import has_signal
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, Prompt, Sample, Unfinished
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.collect import Collector, encode_prompt
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.ledger import Ledger


class Drawn(NamedTuple):
    """A step's batch. groups: this rank's share. numbers: for metrics.jsonl."""

    groups: list[Group]
    numbers: dict[str, float]


class Drawing:
    """The place in the training prompts, and what is carried from step to step."""

    def __init__(
        self,
        config: Config,
        collector: Collector,
        prompt: Callable[[int], Prompt],
        ledger: Ledger,
        layout: Layout,
    ):
        """`prompt(number)`: training prompt 0, 1, … of the run, without token ids."""
        self.config, self.collector, self.prompt, self.ledger, self.layout = (
            config,
            collector,
            prompt,
            ledger,
            layout,
        )
        settings = config.rollout
        self.is_choosy = settings.over_sampling > 1 or settings.dynamic_filtering
        self.sampling = Sampling(
            settings.temperature, settings.top_p, settings.max_response_tokens, collector.folder.stop_ids
        )
        self.next_prompt = 0
        self._carried: list[Unfinished] = []
        self._kept: dict[tuple[str, int], tuple[int, Sample]] = {}
        self._start = (0, 0)  # the last step drawn, and the first prompt that had not been drawn before

    def place(self, step: int) -> int:
        """The first prompt that had not been drawn before `step`: what a checkpoint keeps, to go on with
        `step`.
        """
        return self._start[1] if step == self._start[0] else self.next_prompt

    def go_on(self, step: int, next_prompt: int) -> None:
        """As it was before `step` was drawn."""
        self.next_prompt, self._carried, self._kept = (
            next_prompt,
            self.ledger.carried(step),
            self.ledger.kept(step),
        )

    def draw(self, step: int, version: str, watch: Stopwatch | None = None) -> Drawn:
        """The batch of `step`, sampled by the engine's weights `version`. All ranks together when choosy."""
        settings = self.config.rollout
        target, self._start = settings.prompts_per_step, (step, self.next_prompt)
        begun, self._carried = self._fresh(self._carried, step), []
        kept, self._kept = self._kept, {}  # what a stopped run had of the first step after it
        chosen: list[Group] = []
        dull: list[Group] = []
        rounds = 0
        while True:
            wanted = target - len(chosen)
            begun += self._new(max(0, math.ceil(wanted * settings.over_sampling) - len(begun)), step, version)
            rounds += 1
            groups, begun = self._round(rounds, begun, wanted, step, kept, watch)
            if not self.is_choosy:
                return Drawn(groups, {})
            chosen += [group for group in groups if not settings.dynamic_filtering or self._has_signal(group)]
            dull += [group for group in groups if settings.dynamic_filtering and not self._has_signal(group)]
            if len(chosen) < target and rounds >= settings.filter_rounds:  # better a full batch than none
                fill = dull[: target - len(chosen)]
                chosen, dull = chosen + fill, dull[len(fill) :]
            if len(chosen) >= target:
                break
        self._carried = [
            Unfinished(prompt=group[0].prompt, samples=group) for group in chosen[target:]
        ] + begun
        self.ledger.filtered(step, [group[0].prompt.id for group in dull])
        self.ledger.carry(step + 1, self._carried)
        numbers = {"groups_filtered": len(dull), "groups_carried": len(self._carried), "rounds": rounds}
        return Drawn(chosen[:target][self.layout.rank :: self.layout.world_size], numbers)

    def _new(self, count: int, step: int, version: str) -> list[Unfinished]:
        prompts = [self.prompt(number) for number in range(self.next_prompt, self.next_prompt + count)]
        self.next_prompt += count
        if prompts:
            self.ledger.drawn(step, version, [prompt.id for prompt in prompts])
        return [Unfinished(prompt=prompt) for prompt in prompts]

    def _round(
        self,
        number: int,
        begun: list[Unfinished],
        wanted: int,
        step: int,
        kept: dict[tuple[str, int], tuple[int, Sample]],
        watch: Stopwatch | None,
    ) -> tuple[list[Group], list[Unfinished]]:
        """Whole groups and what was broken off: all ranks' when choosy, else this rank's share (of which all
        is whole).
        """
        settings = self.config.rollout
        known = {
            key: sample for key, (made_in, sample) in kept.items() if made_in <= number
        }  # a later round's: not yet, as it was
        mine = [self._with_kept(one, known) for one in begun[self.layout.rank :: self.layout.world_size]]
        share, found = math.ceil(wanted * len(mine) / len(begun)), 0

        def is_enough(group: Group) -> bool:
            nonlocal found
            found += not settings.dynamic_filtering or self._has_signal(group)
            return self.is_choosy and found >= share

        groups, left = self.collector.collect(
            mine,
            settings.samples_per_prompt,
            self.sampling,
            seed=f"{self.config.train.seed}/{step}",
            is_enough=is_enough,
            keep=lambda samples: self.ledger.keep(step, number, samples),
            watch=watch,
        )
        return self._show(groups, left, begun) if self.is_choosy else (groups, left)

    def _with_kept(self, one: Unfinished, kept: dict[tuple[str, int], Sample]) -> Unfinished:
        """With token ids, and with the samples that a stopped run had finished."""
        prompt = (
            one.prompt
            if one.prompt.ids
            else encode_prompt(one.prompt, self.collector.folder, self.config.rollout)
        )
        samples = {sample.index: sample for sample in one.samples}
        for index in range(self.config.rollout.samples_per_prompt):
            if (sample := kept.get((prompt.id, index))) and sample.prompt == prompt:
                samples[index] = sample
        return Unfinished(prompt=prompt, samples=tuple(samples[index] for index in sorted(samples)))

    def _show(
        self, groups: Sequence[Group], left: Sequence[Unfinished], begun: Sequence[Unfinished]
    ) -> tuple[list[Group], list[Unfinished]]:
        """All ranks' groups and leftovers, in the order of `begun`."""
        own = [*(Unfinished(prompt=group[0].prompt, samples=group) for group in groups), *left]
        text = "\n".join(one.model_dump_json() for one in own)
        everyone = {}
        for payload in self.layout.gather_bytes(text.encode(), background=True):
            for line in payload.decode().split("\n"):
                if line:
                    one = Unfinished.model_validate_json(line)
                    everyone[one.prompt.id] = one
        in_order = [everyone[one.prompt.id] for one in begun]
        size = self.config.rollout.samples_per_prompt
        is_whole = [
            len(one.samples) == size and all(sample.verdict is not None for sample in one.samples)
            for one in in_order
        ]
        whole = [one.samples for one, whole in zip(in_order, is_whole, strict=True) if whole]
        return whole, [one for one, whole in zip(in_order, is_whole, strict=True) if not whole]

    def _has_signal(self, group: Group) -> bool:
        return has_signal(group, self.config.algorithm, self.config.teacher.feedback)

    def _fresh(self, carried: Sequence[Unfinished], step: int) -> list[Unfinished]:
        """Without the samples whose oldest token is too many versions older than the policy that will train
        on them.
        """
        oldest = step - 1 - self.config.rollout.max_staleness
        is_fresh = lambda sample: min(int(version) for version, _, _ in sample.versions) >= oldest  # noqa: E731
        return [one.model_copy(update={"samples": tuple(filter(is_fresh, one.samples))}) for one in carried]
