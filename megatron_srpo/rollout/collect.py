"""Sample and verify this rank's prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from threading import Event
from types import MappingProxyType

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.data.records import Group, PartialGroup, Prompt, Sample, SampleKey, Segment, Verdict
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.engine import Completion, Engine, Request, Sampling
from megatron_srpo.tasks.pool import Job, Pool


def encode_prompt(prompt: Prompt, folder: HFFolder, settings: RolloutSection) -> Prompt:
    """Return the prompt with token ids. Raises ConfigError if it exceeds rollout.max_prompt_tokens."""
    ids = tuple(folder.encode(list(prompt.messages), settings.enable_thinking))
    if len(ids) > settings.max_prompt_tokens:
        found = f"{settings.max_prompt_tokens}, but prompt {prompt.id} has {len(ids)} tokens"
        raise ConfigError(f"rollout.max_prompt_tokens: {found}; raise it")
    return prompt.model_copy(update={"ids": ids})


def with_known(group: PartialGroup, known: Mapping[SampleKey, Sample], size: int) -> PartialGroup:
    """Add the samples of `known` that belong to this group of `size`, unless their prompt has changed."""
    samples = {sample.index: sample for sample in group.samples}
    for index in range(size):
        sample = known.get((group.prompt.id, index))
        if sample is not None and sample.prompt == group.prompt:
            samples[index] = sample
    return PartialGroup(prompt=group.prompt, samples=tuple(samples[index] for index in sorted(samples)))


class PendingGroups:
    """Groups of `size` samples in progress: the finished, aborted and missing samples."""

    def __init__(self, partial: Sequence[PartialGroup], size: int):
        self.prompts = [group.prompt for group in partial]
        self.size = size
        self._samples: dict[SampleKey, Sample] = {}
        self._missing = {prompt.id: size for prompt in self.prompts}
        self.recovered = self.add(sample for group in partial for sample in group.samples)

    def add(self, samples: Iterable[Sample]) -> list[Group]:
        """Record new samples; return the groups that they complete, not yet verified."""
        complete = []
        for sample in samples:
            prompt_id = sample.prompt.id
            self._samples[prompt_id, sample.index] = sample
            if sample.finish_reason != "abort":
                self._missing[prompt_id] -= 1
                if not self._missing[prompt_id]:
                    complete.append(tuple(self._samples[prompt_id, index] for index in range(self.size)))
        return complete

    def missing(self) -> Iterator[tuple[Prompt, int, Sample | None]]:
        """Yield (prompt, index, aborted sample or None) of every sample that is not finished."""
        for prompt in self.prompts:
            for index in range(self.size):
                sample = self._samples.get((prompt.id, index))
                if sample is None or sample.finish_reason == "abort":
                    yield prompt, index, sample

    def incomplete(self) -> list[PartialGroup]:
        """Return the groups with missing samples, in the order of their prompts."""
        groups = []
        for prompt in self.prompts:
            if self._missing[prompt.id]:
                keys = [(prompt.id, index) for index in range(self.size)]
                samples = tuple(self._samples[key] for key in keys if key in self._samples)
                groups.append(PartialGroup(prompt=prompt, samples=samples))
        return groups


@dataclass(eq=False)
class Collector:
    """Sample prompts with this rank's engine and verify the responses."""

    verifiers: Pool
    engine: Engine
    folder: HFFolder
    layout: Layout
    settings: RolloutSection

    def prompts(self, prompt: Callable[[int], Prompt], numbers: range) -> list[Prompt]:
        """Return this rank's share of the prompts `numbers`, with token ids: every world_size-th."""
        mine = numbers[self.layout.rank :: self.layout.world_size]
        return [encode_prompt(prompt(number), self.folder, self.settings) for number in mine]

    def sample(
        self,
        prompts: Sequence[Prompt],
        size: int,
        sampling: Sampling,
        seed: str,
        known: Mapping[SampleKey, Sample] = MappingProxyType({}),
        persist: Callable[[Sequence[Sample]], None] | None = None,
    ) -> list[Group]:
        """Return a verified group of `size` responses for each prompt, in order.

        Samples in `known` are not sampled again; `persist` is called with others as they finish.
        """
        started = [with_known(PartialGroup(prompt=prompt), known, size) for prompt in prompts]
        found = self.collect(PendingGroups(started, size), sampling, seed, Event(), persist)
        groups = {group[0].prompt.id: group for group in found}
        return [groups[prompt.id] for prompt in prompts]

    def collect(
        self,
        pending: PendingGroups,
        sampling: Sampling,
        seed: str,
        stop: Event,
        persist: Callable[[list[Sample]], None] | None = None,
        watch: Stopwatch | None = None,
    ) -> Iterator[Group]:
        """Yield each group, verified, as soon as its last sample is finished, while others are in flight.

        A sample's randomness depends on (seed, prompt id, index) alone. The consumer sets `stop` when it has
        enough groups: the others are aborted, and left in `pending.incomplete()`. `persist` stores finished
        samples before they are verified, one delivery per call. watch: None in a background thread.
        """
        yield from self.verify(pending.recovered, watch)
        if stop.is_set():
            return
        for samples in self._generate(pending, sampling, seed, stop):
            beat()
            finished = [sample for sample in samples if sample.finish_reason != "abort"]
            if persist is not None and finished:
                persist(finished)
            yield from self.verify(pending.add(samples), watch)

    def _generate(
        self, pending: PendingGroups, sampling: Sampling, seed: str, stop: Event
    ) -> Iterator[list[Sample]]:
        """Yield the samples of each delivery; aborted ones only if they have tokens."""
        missing = list(pending.missing())
        requests = []
        for prompt, index, aborted in missing:
            start = None
            if aborted is not None:
                start = Completion([*aborted.response_ids], [*aborted.logprobs], [*aborted.versions], "abort")
            requests.append(Request(prompt.ids, f"{seed}/{prompt.id}/{index}", start))
        with closing(self.engine.generate(requests, sampling, stop)) as deliveries:
            for completions in deliveries:
                samples = []
                for number, completion in completions.items():
                    if completion.ids:
                        prompt, index, _ = missing[number]
                        samples.append(self._sample(prompt, index, completion))
                yield samples

    def _sample(self, prompt: Prompt, index: int, completion: Completion) -> Sample:
        ids, logprobs = tuple(completion.ids), tuple(completion.logprobs)
        segments = (Segment(ids=ids, logprobs=logprobs, versions=tuple(completion.versions)),)
        text = self.folder.decode(completion.ids, prompt.ids)
        reason = completion.finish_reason
        return Sample(prompt=prompt, index=index, segments=segments, finish_reason=reason, text=text)

    def verify(self, groups: Sequence[Group], watch: Stopwatch | None = None) -> list[Group]:
        """Return the groups with verdicts; wrong samples get the feedback of their prompt if it has one."""
        if not groups:
            return []
        samples = [sample for group in groups for sample in group]
        jobs = [Job(sample.prompt.task, sample.prompt.answer, sample.text) for sample in samples]
        with watch("verify") if watch else nullcontext():
            verdicts = iter(self.verifiers.verify(jobs))
        return [tuple(_with_verdict(sample, next(verdicts)) for sample in group) for group in groups]


def _with_verdict(sample: Sample, verdict: Verdict) -> Sample:
    if sample.prompt.feedback and not verdict.correct and not verdict.verifier_failed:
        verdict = verdict.model_copy(update={"feedback": sample.prompt.feedback})
    return sample.model_copy(update={"verdict": verdict})
