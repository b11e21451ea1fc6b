"""Build the batch of a step: sample and verify prompts in rounds until it has enough groups.

All ranks run the same rounds, and each samples its share of a round's prompts. Without over-sampling and
filtering there is one round, without communication. With them, each rank stops when it has its share of the
groups needed, ranks exchange what they have found about their groups, and another round follows if these are
not enough. Leftover groups and partial rollouts continue in the next step. A group itself is sent only to the
rank that needs it next, and to the first rank if a checkpoint may need it.

Short responses finish first, so discarding what is pending would remove long ones from the training data. A
rank therefore does not stop while it has a pending group that would be too stale in the next step, or more
groups than this step and the next one can use. Then every prompt that was started is trained, with its first
samples, or is discarded for its place in the order, not for its length.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Event
from typing import NamedTuple

import numpy as np

from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.data.records import Group, PartialGroup, Prompt, Sample, SampleKey
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.collect import Collector, PendingGroups, encode_prompt, with_known
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.ledger import Ledger, Recovered


class Batch(NamedTuple):
    """This rank's share of a step's groups, and metrics of the selection for metrics.jsonl."""

    groups: list[Group]
    metrics: dict[str, float]


class _Started(NamedTuple):
    """A group that has been started, as every rank knows it."""

    group: PartialGroup | None  # None on ranks without the samples
    oldest: tuple[int, ...]  # for each sample, the version of its oldest token
    holder: int | None = None  # the rank that has the group; None: all ranks
    bytes: int = 0  # of the group as JSON
    is_complete: bool = False  # sampled and verified
    is_useful: bool = False

    @classmethod
    def of(cls, group: PartialGroup) -> "_Started":
        """Return a group that all ranks have."""
        return cls(group, tuple(map(_oldest_version, group.samples)))

    @property
    def held(self) -> PartialGroup:
        """The group, on a rank that has it."""
        assert self.group is not None
        return self.group

    @property
    def age(self) -> float:
        """A key that sorts groups by their oldest weights; groups without a sample are last."""
        return min(self.oldest, default=math.inf)


class _Round(NamedTuple):
    """Groups of a round, on this rank."""

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
        self._carried: list[_Started] = []
        self._recovered: dict[SampleKey, Recovered] = {}
        self._last_step = 0
        self._before_last_step: tuple[int, list[_Started]] = 0, []  # next_prompt and carried

    def state_before(self, step: int) -> tuple[int, list[PartialGroup]]:
        """Return the first prompt not started before `step` and the groups left over, for a checkpoint.

        The first rank has all of these groups, other ranks may have only those that they sample in `step`.
        """
        state = self._before_last_step if step == self._last_step else (self.next_prompt, self._carried)
        next_prompt, carried = state
        return next_prompt, [one.group for one in carried if one.group is not None]

    def resume(self, step: int, next_prompt: int, carried: list[PartialGroup]) -> None:
        """Restore the state before `step` was sampled; all ranks have the `carried` groups."""
        self.next_prompt, self._carried = next_prompt, [_Started.of(group) for group in carried]
        self._recovered = self.ledger.recovered(step)

    def build(self, step: int, watch: Stopwatch | None = None) -> Batch:
        """Sample the batch of `step`. Collective if groups are selected. watch: None in another thread."""
        settings, target = self.settings, self.settings.prompts_per_step
        self._last_step, self._before_last_step = step, (self.next_prompt, self._carried)
        incomplete, dropped = self._drop_stale(self._carried, step)
        self._carried = []
        recovered, self._recovered = self._recovered, {}
        chosen: list[_Started] = []
        no_signal: list[_Started] = []
        rounds = 0
        while len(chosen) < target:
            rounds += 1
            needed = target - len(chosen)
            incomplete += self._new_prompts(math.ceil(needed * settings.over_sampling) - len(incomplete))
            # a recovered sample is not used before its round, so that every round repeats exactly
            known = {key: found.sample for key, found in recovered.items() if found.round <= rounds}
            own = self._sample_round(rounds, incomplete, needed, step, known, watch)
            if not self.selects:
                return Batch(own.groups, {})
            found = self._gather_round(own, incomplete)
            for one in (one for one in found if one.is_complete):
                (chosen if one.is_useful else no_signal).append(one)
            if rounds >= settings.filter_rounds:  # fill the batch instead of sampling forever
                missing = max(0, target - len(chosen))
                chosen += no_signal[:missing]
                no_signal = no_signal[missing:]
            incomplete = [one for one in found if not one.is_complete]
            if len(chosen) < target:
                incomplete = self._move(incomplete)
        # the next step uses the oldest ones first
        carried = sorted(chosen[target:] + incomplete, key=lambda one: one.age)
        self._carried = self._move(carried, keeps_all=True)
        metrics: dict[str, float] = {"groups_filtered": len(no_signal), "groups_carried": len(carried)}
        metrics |= {"samples_dropped": dropped, "rounds": rounds}
        batch = self._move(chosen[:target])[self.layout.rank :: self.layout.world_size]
        return Batch([one.held.samples for one in batch], metrics)

    def _new_prompts(self, count: int) -> list[_Started]:
        numbers = range(self.next_prompt, self.next_prompt + max(0, count))
        self.next_prompt += len(numbers)
        return [_Started.of(PartialGroup(prompt=self.prompt(number))) for number in numbers]

    def _sample_round(
        self,
        round_number: int,
        started: list[_Started],
        needed: int,
        step: int,
        known: dict[SampleKey, Sample],
        watch: Stopwatch | None,
    ) -> _Round:
        """Sample this rank's part of the groups in `started`: every world_size-th."""
        own = started[self.layout.rank :: self.layout.world_size]
        mine = [self._with_known(one.held, known) for one in own]
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
        return _Round(in_order, pending.incomplete())

    def _with_known(self, group: PartialGroup, known: Mapping[SampleKey, Sample]) -> PartialGroup:
        """Return the group with token ids, and with its samples recovered from a stopped run."""
        if not group.prompt.ids:
            prompt = encode_prompt(group.prompt, self.collector.folder, self.settings)
            group = group.model_copy(update={"prompt": prompt})
        return with_known(group, known, self.settings.samples_per_prompt)

    def _gather_round(self, own: _Round, started: Sequence[_Started]) -> list[_Started]:
        """Return what all ranks have found about the groups in `started`, in their order. A collective.

        A rank's message: for each of its groups int64 complete, useful, bytes as JSON, number of samples, and
        of each sample the version of its oldest token.
        """
        rank, ranks = self.layout.rank, self.layout.world_size
        complete = [PartialGroup(prompt=group[0].prompt, samples=group) for group in own.groups]
        useful = {group[0].prompt.id for group in own.groups if self._is_useful(group)}
        groups = {group.prompt.id: group for group in complete + own.incomplete}
        finished = {group.prompt.id for group in complete}
        mine = [groups[one.held.prompt.id] for one in started[rank::ranks]]
        numbers: list[int] = []
        for group in mine:
            oldest, name = map(_oldest_version, group.samples), group.prompt.id
            size = len(group.model_dump_json().encode()) if ranks > 1 else 0
            numbers += [name in finished, name in useful, size, len(group.samples), *oldest]
        found = list(started)
        messages = self.layout.gather_bytes(np.array(numbers, "<i8").tobytes(), background=True)
        for sender, message in enumerate(messages):
            values = iter(np.frombuffer(message, "<i8").tolist())
            for place in range(sender, len(started), ranks):
                is_complete, is_useful, size, count = islice(values, 4)
                group = mine[place // ranks] if sender == rank else None
                flags = bool(is_complete), bool(is_useful)
                found[place] = _Started(group, tuple(islice(values, count)), sender, size, *flags)
        return found

    def _move(self, groups: Sequence[_Started], keeps_all: bool = False) -> list[_Started]:
        """Send each of `groups` to the rank that uses it next: every world_size-th to one rank. A collective.

        keeps_all: the first rank receives all of them, for the checkpoint.
        """
        rank, ranks = self.layout.rank, self.layout.world_size
        outgoing: dict[int, bytes] = {}
        expected: dict[int, list[int]] = {}  # from each rank, the places in `groups`
        moved: list[_Started] = []
        for place, one in enumerate(groups):
            users = {place % ranks, 0} if keeps_all else {place % ranks}
            if one.holder == rank:
                data = one.held.model_dump_json().encode()
                outgoing |= {user: outgoing.get(user, b"") + data for user in users - {rank}}
            elif one.holder is not None and rank in users:
                expected.setdefault(one.holder, []).append(place)
            moved.append(one if rank in users else one._replace(group=None))
        sizes = {sender: sum(groups[place].bytes for place in places) for sender, places in expected.items()}
        for sender, message in self.layout.exchange_bytes(outgoing, sizes, background=True).items():
            start = 0
            for place in expected[sender]:
                end = start + groups[place].bytes
                moved[place] = moved[place]._replace(
                    group=PartialGroup.model_validate_json(message[start:end])
                )
                start = end
        return moved

    def _is_useful(self, group: Group) -> bool:
        return not self.settings.dynamic_filtering or self.has_signal(group)

    def _expires(self, group: PartialGroup, step: int) -> bool:
        """Return True if the next step would discard samples of this group, started now or before."""
        oldest = step - self.settings.max_staleness
        now = step - 1 - self.settings.async_steps
        return min([now, *map(_oldest_version, group.samples)]) < oldest

    def _drop_stale(self, carried: Sequence[_Started], step: int) -> tuple[list[_Started], int]:
        """Remove the samples whose oldest token exceeds max_staleness at `step`; return their number too."""
        oldest = step - 1 - self.settings.max_staleness
        groups: list[_Started] = []
        dropped = 0
        for one in carried:
            fresh = tuple(version for version in one.oldest if version >= oldest)
            dropped += len(one.oldest) - len(fresh)
            group = one.group
            if group is not None:
                samples = tuple(sample for sample in group.samples if _oldest_version(sample) >= oldest)
                group = group.model_copy(update={"samples": samples})
            groups.append(one._replace(group=group, oldest=fresh))
        return groups, dropped


def _oldest_version(sample: Sample) -> int:
    return min(int(version) for version, _, _ in sample.versions)
