"""Build the batch of a step: sample and verify prompts in rounds until it has enough groups.

All ranks run the same rounds, and each samples its share of a round's prompts. Without over-sampling and
filtering there is one round, without communication. With them, each rank stops when it has its share of the
groups needed, ranks exchange their groups, and another round follows if these are not enough. Leftover groups
and partial rollouts continue in the next step.

Short responses finish first, so discarding what is pending would remove long ones from the training data. A
rank therefore does not stop while it has a pending group that would be too stale in the next step, or more
groups than this step and the next one can use. Then every prompt that was started is trained, with its first
samples, or is discarded for its place in the order, not for its length.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import NamedTuple

from pydantic import TypeAdapter

from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.data.records import Group, PartialGroup, Prompt, Sample, SampleKey
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.collect import Collector, PendingGroups, encode_prompt, with_known
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.ledger import Ledger, Recovered

_PARTIAL_GROUPS = TypeAdapter(list[PartialGroup])


class Batch(NamedTuple):
    """This rank's share of a step's groups, and metrics of the selection for metrics.jsonl."""

    groups: list[Group]
    metrics: dict[str, float]


class _Round(NamedTuple):
    """Groups of a round: of all ranks when groups are selected, else of this rank."""

    groups: list[Group]
    incomplete: list[PartialGroup]


@dataclass(eq=False)
class BatchBuilder:
    """Cursor over the training prompts, and the partial rollouts carried between steps."""

    collector: Collector
    prompt: Callable[[int], Prompt]  # returns training prompt 0, 1, … of the run, without token ids
    ledger: Ledger
    settings: RolloutSection
    seed: int  # train.seed
    has_signal: Callable[[Group], bool]  # True for a verified group that the algorithm can learn from

    def __post_init__(self) -> None:
        settings, collector = self.settings, self.collector
        self.layout: Layout = collector.layout
        self.selects = settings.over_sampling > 1 or settings.dynamic_filtering
        self.sampling = Sampling(
            settings.temperature, settings.top_p, settings.max_response_tokens, collector.folder.stop_ids
        )
        self.next_prompt = 0
        self.carried: list[PartialGroup] = []
        self._recovered: dict[SampleKey, Recovered] = {}
        self._last_step = 0
        self._before_last_step: tuple[int, list[PartialGroup]] = 0, []  # next_prompt and carried

    def state_before(self, step: int) -> tuple[int, list[PartialGroup]]:
        """Return the first prompt not started before `step` and the groups left over, for a checkpoint."""
        return self._before_last_step if step == self._last_step else (self.next_prompt, self.carried)

    def resume(self, step: int, next_prompt: int, carried: list[PartialGroup]) -> None:
        """Restore the state before `step` was sampled."""
        self.next_prompt, self.carried = next_prompt, carried
        self._recovered = self.ledger.recovered(step)

    def build(self, step: int, watch: Stopwatch | None = None) -> Batch:
        """Sample the batch of `step`. Collective if groups are selected. watch: None in another thread."""
        settings, target = self.settings, self.settings.prompts_per_step
        self._last_step, self._before_last_step = step, (self.next_prompt, self.carried)
        incomplete, dropped = self._drop_stale(self.carried, step)
        self.carried = []
        recovered, self._recovered = self._recovered, {}
        chosen: list[Group] = []
        no_signal: list[Group] = []
        rounds = 0
        while len(chosen) < target:
            rounds += 1
            needed = target - len(chosen)
            incomplete += self._new_prompts(math.ceil(needed * settings.over_sampling) - len(incomplete))
            # a recovered sample is not used before its round, so that every round repeats exactly
            known = {key: found.sample for key, found in recovered.items() if found.round <= rounds}
            groups, incomplete = self._sample_round(rounds, incomplete, needed, step, known, watch)
            if not self.selects:
                return Batch(groups, {})
            for group in groups:
                (chosen if self._is_useful(group) else no_signal).append(group)
            if rounds >= settings.filter_rounds:  # fill the batch instead of sampling forever
                missing = max(0, target - len(chosen))
                chosen += no_signal[:missing]
                no_signal = no_signal[missing:]
        left_over = [PartialGroup(prompt=group[0].prompt, samples=group) for group in chosen[target:]]
        self.carried = sorted(left_over + incomplete, key=_age)  # the next step uses the oldest ones first
        metrics: dict[str, float] = {"groups_filtered": len(no_signal), "groups_carried": len(self.carried)}
        metrics |= {"samples_dropped": dropped, "rounds": rounds}
        return Batch(chosen[:target][self.layout.rank :: self.layout.world_size], metrics)

    def _new_prompts(self, count: int) -> list[PartialGroup]:
        numbers = range(self.next_prompt, self.next_prompt + max(0, count))
        self.next_prompt += len(numbers)
        return [PartialGroup(prompt=self.prompt(number)) for number in numbers]

    def _sample_round(
        self,
        round_number: int,
        started: list[PartialGroup],
        needed: int,
        step: int,
        known: dict[SampleKey, Sample],
        watch: Stopwatch | None,
    ) -> _Round:
        mine = [self._with_known(one, known) for one in started[self.layout.rank :: self.layout.world_size]]
        part = len(mine) / len(started)
        share, usable = math.ceil(needed * part), (needed + self.settings.prompts_per_step) * part
        expiring = {one.prompt.id for one in mine if self._expires(one, step)}
        pending = PendingGroups(mine, self.settings.samples_per_prompt)
        stop = Event()
        persist = partial(self.ledger.persist, step, round_number)
        groups: dict[str, Group] = {}
        useful = 0
        seed = f"{self.seed}/{step}"
        for group in self.collector.collect(pending, self.sampling, seed, stop, persist, watch):
            groups[group[0].prompt.id] = group
            expiring.discard(group[0].prompt.id)
            useful += self._is_useful(group)
            left = len(mine) - (len(groups) - useful)  # without those that have no signal
            if self.selects and useful >= share and not expiring and left <= usable:
                stop.set()
        in_order = [groups[one.prompt.id] for one in mine if one.prompt.id in groups]
        own = _Round(in_order, pending.incomplete())
        return self._gather_round(own, started) if self.selects else own

    def _with_known(self, group: PartialGroup, known: Mapping[SampleKey, Sample]) -> PartialGroup:
        """Return the group with token ids, and with its samples recovered from a stopped run."""
        if not group.prompt.ids:
            prompt = encode_prompt(group.prompt, self.collector.folder, self.settings)
            group = group.model_copy(update={"prompt": prompt})
        return with_known(group, known, self.settings.samples_per_prompt)

    def _gather_round(self, own: _Round, started: Sequence[PartialGroup]) -> _Round:
        """Return all ranks' groups, in the order of `started`."""
        groups = [PartialGroup(prompt=group[0].prompt, samples=group) for group in own.groups]
        text = _PARTIAL_GROUPS.dump_json(groups + own.incomplete)
        found = {}
        for part in self.layout.gather_bytes(text, background=True):
            found |= {one.prompt.id: one for one in _PARTIAL_GROUPS.validate_json(part)}
        gathered = _Round([], [])
        for one in started:
            group = found[one.prompt.id]
            verified = [sample for sample in group.samples if sample.verdict is not None]
            if len(verified) == self.settings.samples_per_prompt:
                gathered.groups.append(group.samples)
            else:
                gathered.incomplete.append(group)
        return gathered

    def _is_useful(self, group: Group) -> bool:
        return not self.settings.dynamic_filtering or self.has_signal(group)

    def _expires(self, group: PartialGroup, step: int) -> bool:
        """Return True if the next step would discard samples of this group, started now or before."""
        oldest = step - self.settings.max_staleness
        now = step - 1 - self.settings.async_steps
        return min([now, *map(_oldest_version, group.samples)]) < oldest

    def _drop_stale(self, carried: Sequence[PartialGroup], step: int) -> tuple[list[PartialGroup], int]:
        """Remove the samples whose oldest token exceeds max_staleness at `step`; return their number too."""
        oldest = step - 1 - self.settings.max_staleness
        groups = []
        dropped = 0
        for group in carried:
            fresh = tuple(sample for sample in group.samples if _oldest_version(sample) >= oldest)
            dropped += len(group.samples) - len(fresh)
            groups.append(group.model_copy(update={"samples": fresh}))
        return groups, dropped


def _oldest_version(sample: Sample) -> int:
    return min(int(version) for version, _, _ in sample.versions)


def _age(group: PartialGroup) -> float:
    """Return a key that sorts groups by their oldest weights; groups without a sample are last."""
    return min(map(_oldest_version, group.samples), default=math.inf)
