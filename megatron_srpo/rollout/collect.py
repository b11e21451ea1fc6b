"""From prompt numbers to verified groups: this rank's share of a step, and the exchange that shows every
rank all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from megatron_srpo.config.schema import ConfigError, RolloutSection
from megatron_srpo.data.records import Group, Prompt, Sample, Segment, Unfinished, Verdict
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.engine import Completion, Engine, Request, Sampling
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

    def __init__(
        self, verifiers: Pool, engine: Engine, folder: HFFolder, layout: Layout, settings: RolloutSection
    ):
        self.verifiers, self.engine, self.folder, self.layout, self.settings = (
            verifiers,
            engine,
            folder,
            layout,
            settings,
        )

    def prompts(self, prompt: Callable[[int], Prompt], numbers: range) -> list[Prompt]:
        """This rank's share of the prompts of `numbers`, with their token ids: every world_size-th, from its
        rank on.
        """
        mine = numbers[self.layout.rank :: self.layout.world_size]
        return [encode_prompt(prompt(number), self.folder, self.settings) for number in mine]

    def sample(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, sampling: Sampling, seed: str
    ) -> list[Group]:
        """Verified groups of `samples_per_prompt` responses.

        A sample's randomness is (seed, prompt id, index) alone.
        """
        return self.collect(
            [Unfinished(prompt=prompt) for prompt in prompts], samples_per_prompt, sampling, seed
        )[0]

    def collect(
        self,
        begun: Sequence[Unfinished],
        samples_per_prompt: int,
        sampling: Sampling,
        seed: str,
        is_enough: Callable[[Group], bool] = lambda group: False,
        keep: Callable[[Sequence[Sample]], None] = lambda samples: None,
        watch: Stopwatch | None = None,
    ) -> tuple[list[Group], list[Unfinished]]:
        """Groups with their verdicts, and the prompts that were broken off, in the order of `begun`.

        A group is verified as soon as its last sample is finished, while others still run.

        Args:
            begun: prompts, with what has been sampled of them before: that is not sampled again.
            is_enough: called with each group when it is verified; True: the rest is broken off.
            keep: called with new samples as soon as they are finished, with those that the engine hands over
                together.
            watch: counts the seconds of verification as phase `verify`.
        """
        samples = {
            (sample.prompt.id, sample.index): sample for unfinished in begun for sample in unfinished.samples
        }
        missing = [
            (unfinished.prompt, index)
            for unfinished in begun
            for index in range(samples_per_prompt)
            if (sample := samples.get((unfinished.prompt.id, index))) is None
            or sample.finish_reason == "abort"
        ]
        open_places = Counter(prompt.id for prompt, _ in missing)
        groups: dict[str, Group] = {}

        def finish_groups(prompt_ids: Sequence[str]) -> bool:
            whole = [
                tuple(samples[prompt_id, index] for index in range(samples_per_prompt))
                for prompt_id in prompt_ids
            ]
            new = dict(zip(prompt_ids, self.verify(whole, watch), strict=True))
            groups.update(new)
            return any([is_enough(group) for group in new.values()])  # asked of each: it counts them

        def finished(completions: Mapping[int, Completion]) -> bool:
            beat()
            done, whole = [], []
            for number, completion in completions.items():
                prompt, index = missing[number]
                if completion.ids:
                    samples[prompt.id, index] = self._sample(prompt, index, completion)
                if completion.finish_reason != "abort":
                    done.append(samples[prompt.id, index])
                    open_places[prompt.id] -= 1
                    whole += [prompt.id] * (open_places[prompt.id] == 0)
            if done:
                keep(done)
            return finish_groups(whole)

        had_enough = finish_groups(
            [one.prompt.id for one in begun if not open_places[one.prompt.id]]
        )  # nothing of them is missing
        requests = [self._request(prompt, index, samples, seed) for prompt, index in missing]
        if not had_enough:
            self.engine.generate(requests, sampling, finished)
        indices = range(samples_per_prompt)
        left = [
            Unfinished(
                prompt=one.prompt,
                samples=tuple(sample for i in indices if (sample := samples.get((one.prompt.id, i)))),
            )
            for one in begun
            if one.prompt.id not in groups
        ]
        return [groups[one.prompt.id] for one in begun if one.prompt.id in groups], left

    def _request(
        self, prompt: Prompt, index: int, samples: Mapping[tuple[str, int], Sample], seed: str
    ) -> Request:
        before = samples.get((prompt.id, index))
        start = (
            None
            if before is None
            else Completion([*before.response_ids], [*before.logprobs], [*before.versions], "abort")
        )
        return Request(prompt.ids, f"{seed}/{prompt.id}/{index}", start)

    def _sample(self, prompt: Prompt, index: int, completion: Completion) -> Sample:
        return Sample(
            prompt=prompt,
            index=index,
            segments=(
                Segment(
                    ids=tuple(completion.ids),
                    logprobs=tuple(completion.logprobs),
                    versions=tuple(completion.versions),
                ),
            ),
            finish_reason=completion.finish_reason,
            text=self.folder.tokenizer.decode(completion.ids, skip_special_tokens=True),
        )

    def verify(self, groups: Sequence[Group], watch: Stopwatch | None = None) -> list[Group]:
        """Every sample with its verdict; a failed one of a prompt that carries feedback has that as its
        feedback.
        """
        samples = [sample for group in groups for sample in group]
        jobs = [Job(sample.prompt.task, sample.prompt.answer, sample.text) for sample in samples]
        with watch("verify") if watch else nullcontext():
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
        by_rank.append(
            [tuple(samples[i : i + int(header)]) for i in range(0, len(samples), int(header) or 1)]
        )
    longest = max(map(len, by_rank))
    return [share[place] for place in range(longest) for share in by_rank if place < len(share)]
