"""From prompt numbers to verified groups: this rank's share of a step, and the exchange that shows every rank all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from megatron_srpo.config import ConfigError, RolloutSection
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.records import Group, Prompt, Sample, Verdict
from megatron_srpo.rollout.engine import Completion, Engine, Request, Sampling
from megatron_srpo.runtime.parallel import Layout
from megatron_srpo.tasks.pool import Job, Pool


def encode_prompt(prompt: Prompt, folder: HFFolder, settings: RolloutSection) -> Prompt:
    """The prompt with its token ids. Raises ConfigError when it is longer than rollout.max_prompt_tokens."""
    ids = tuple(folder.encode(list(prompt.messages), settings.enable_thinking))
    if len(ids) > settings.max_prompt_tokens:
        raise ConfigError(
            f"rollout.max_prompt_tokens: {settings.max_prompt_tokens}, but prompt {prompt.id} has {len(ids)} tokens; raise it"
        )
    return prompt.model_copy(update={"ids": ids})


class Collector:
    """Samples prompts with this rank's engine and has the responses judged."""

    def __init__(self, verifiers: Pool, engine: Engine, folder: HFFolder, layout: Layout, settings: RolloutSection):
        self.verifiers, self.engine, self.folder, self.layout, self.settings = verifiers, engine, folder, layout, settings

    def prompts(self, prompt: Callable[[int], Prompt], numbers: range) -> list[Prompt]:
        """This rank's share of the prompts of `numbers`, with their token ids: every world_size-th, from its rank on."""
        mine = numbers[self.layout.rank :: self.layout.world_size]
        return [encode_prompt(prompt(number), self.folder, self.settings) for number in mine]

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        seed: str,
        kept: Mapping[tuple[str, int], Sample] = MappingProxyType({}),
        keep: Callable[[Sample], None] = lambda sample: None,
    ) -> list[Group]:
        """`samples_per_prompt` responses to each prompt. A sample's randomness is (seed, prompt id, index) alone.

        Args:
            kept: samples made before, by prompt id and index, that are not made again.
            keep: called with each new one as soon as it is finished.
        """
        places = [(prompt, index) for prompt in prompts for index in range(samples_per_prompt)]
        done = {key: sample for prompt, index in places if (sample := kept.get(key := (prompt.id, index))) and sample.prompt == prompt}
        missing = [(prompt, index) for prompt, index in places if (prompt.id, index) not in done]

        def finished(number: int, completion: Completion) -> None:
            prompt, index = missing[number]
            done[prompt.id, index] = sample = self._sample(prompt, index, completion)
            keep(sample)

        requests = [Request(prompt.ids, f"{seed}/{prompt.id}/{index}") for prompt, index in missing]
        self.engine.generate(requests, sampling, finished)
        return [tuple(done[prompt.id, index] for index in range(samples_per_prompt)) for prompt in prompts]

    def _sample(self, prompt: Prompt, index: int, completion: Completion) -> Sample:
        return Sample(
            prompt=prompt,
            index=index,
            response_ids=tuple(completion.ids),
            logprobs=tuple(completion.logprobs),
            versions=tuple(completion.versions),
            finish_reason=completion.finish_reason,
            text=self.folder.tokenizer.decode(completion.ids, skip_special_tokens=True),
        )

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Every sample with its verdict; a failed one of a prompt that carries feedback has that as its feedback."""
        samples = [sample for group in groups for sample in group]
        jobs = [Job(sample.prompt.task, sample.prompt.answer, sample.text) for sample in samples]
        verdicts = iter(self.verifiers.verify(jobs))
        return [tuple(_judged(sample, next(verdicts)) for sample in group) for group in groups]


def _judged(sample: Sample, verdict: Verdict) -> Sample:
    if sample.prompt.feedback and not verdict.correct and not verdict.verifier_failed:
        verdict = verdict.model_copy(update={"feedback": sample.prompt.feedback})
    return sample.model_copy(update={"verdict": verdict})


def exchange(groups: Sequence[Group], layout: Layout) -> list[Group]:
    """Every rank's groups on every rank, in the order of their prompts (rank r holds every world_size-th)."""
    if layout.world_size == 1:
        return list(groups)
    lines = "\n".join(sample.model_dump_json() for group in groups for sample in group)
    size = len(groups[0]) if groups else 0
    by_rank = []
    for payload in layout.gather_bytes(f"{size}\n{lines}".encode()):
        header, *rows = payload.decode().split("\n")
        samples = [Sample.model_validate_json(row) for row in rows if row]
        by_rank.append([tuple(samples[i : i + int(header)]) for i in range(0, len(samples), int(header) or 1)])
    longest = max(map(len, by_rank))
    return [share[place] for place in range(longest) for share in by_rank if place < len(share)]
