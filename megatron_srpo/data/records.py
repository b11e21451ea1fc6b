"""The data of one training step in order of creation: Prompt, Sample, Verdict, Route.

All records are frozen; each phase returns copies with one more field. One `Sample` is one line of
`rollouts/step_NNNNNN.jsonl`; ranks exchange the same line, and replay reads it.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(_Record):
    """One question as the policy sees it."""

    id: str = Field(description="task/split/…, unique in a run, also across epochs; fixed by the seed")
    task: str = Field(description="the task's name, which selects the verifier")
    messages: tuple[dict[str, str], ...] = Field(description="chat messages: role, content")
    answer: str = Field(description="ground truth, read only by the verifier")
    feedback: str | None = Field(default=None, description="the data's feedback for a failed attempt")
    ids: tuple[int, ...] = Field(default=(), description="token ids, generation header included")


class Verdict(_Record):
    """A verifier's verdict on one response."""

    reward: float = Field(allow_inf_nan=False)
    correct: bool = Field(description="c_i of docs/method.md: reward >= 0.5")
    format_ok: bool
    feedback: str | None = Field(default=None, description="the environment's; never the ground truth")
    verifier_failed: str | None = Field(default=None, description="timeout, died, memory, or error: …")
    excluded: bool = Field(default=False, description="not trained, counted or shown in its group")

    @model_validator(mode="after")
    def _correct_by_its_reward(self) -> Self:
        if self.correct != (self.reward >= 0.5):
            found = f"correct: {self.correct}, but reward is {self.reward}"
            raise ValueError(f"{found}; a response is correct if its reward is at least 0.5")
        return self


class Route(_Record):
    """The algorithm's decision on one sample. Weights: z^GRPO and z^SDPO (docs/method.md, section 3)."""

    branch: Literal["grpo", "sdpo", "mixed", "none"]
    policy_weight: float
    distillation_weight: float
    advantage: float
    sibling: int | None = Field(default=None, description="index of the sibling in the teacher's prompt")
    teacher_ids: tuple[int, ...] | None = Field(default=None, description="the teacher's longer prompt")
    no_teacher: Literal["no_correct_sibling", "nothing_to_show"] | None = None
    demonstration_cut: bool = Field(default=False, description="the sibling's text was shortened to fit")

    @property
    def teaches(self) -> bool:
        """True if the loss of the sample has a gradient: a term with a weight that is not zero."""
        return self.distillation_weight > 0 or self.policy_weight * self.advantage != 0


class Segment(_Record):
    """Consecutive tokens of one author. Only the policy's tokens have log-probs and are trained."""

    author: Literal["policy", "environment"] = "policy"
    ids: tuple[int, ...] = Field(min_length=1)
    logprobs: tuple[float, ...] = Field(default=(), description="the engine's, in nats, one per policy token")
    # Half-open spans of a policy segment's `ids`: (weight version, start, end).
    versions: tuple[tuple[str, int, int], ...] = ()

    @model_validator(mode="after")
    def _logprobs_fit(self) -> Self:
        expected = len(self.ids) if self.author == "policy" else 0
        if len(self.logprobs) != expected:
            raise ValueError(f"{len(self.ids)} ids of the {self.author} but {len(self.logprobs)} logprobs")
        return self


class Sample(_Record):
    """One rollout: the prompt, and the segments that follow it.

    Only the policy's segments are counted and trained: see `loss_mask`, `policy_ids` and `logprobs`.
    """

    prompt: Prompt
    index: int = Field(description="position in its group, 0 .. samples_per_prompt - 1")
    segments: tuple[Segment, ...] = Field(min_length=1)
    finish_reason: Literal["stop", "length", "abort"]
    text: str = Field(default="", description="the response decoded; never tokenized again")
    verdict: Verdict | None = None
    route: Route | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_one_response(cls, data: Any) -> Any:
        """Read the format of older run folders, whose samples have one response and no segments."""
        if isinstance(data, dict) and "response_ids" in data and "segments" not in data:
            data = dict(data)
            names = {"ids": "response_ids", "logprobs": "logprobs", "versions": "versions"}
            data["segments"] = [{name: data.pop(old) for name, old in names.items() if old in data}]
        return data

    @model_validator(mode="after")
    def _policy_takes_part(self) -> Self:
        if not any(segment.author == "policy" for segment in self.segments):
            raise ValueError("segments: none is the policy's")
        return self

    @property
    def response_ids(self) -> tuple[int, ...]:
        """All token ids after the prompt, [n]."""
        if len(self.segments) == 1:
            return self.segments[0].ids
        return tuple(token for segment in self.segments for token in segment.ids)

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """True for those of `response_ids` that the policy wrote, [n]."""
        return tuple(segment.author == "policy" for segment in self.segments for _ in segment.ids)

    @property
    def policy_ids(self) -> tuple[int, ...]:
        """The policy's token ids, [p]."""
        return tuple(token for segment in self._policy_segments for token in segment.ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The engine's log-probs of `policy_ids` at the rollout temperature, [p], in nats."""
        return tuple(value for segment in self._policy_segments for value in segment.logprobs)

    @property
    def policy_tokens(self) -> int:
        """p, the number of tokens that the policy wrote."""
        return sum(len(segment.ids) for segment in self._policy_segments)

    @property
    def versions(self) -> tuple[tuple[str, int, int], ...]:
        """Half-open spans (weight version, start, end) of `response_ids`."""
        spans: list[tuple[str, int, int]] = []
        offset = 0
        for segment in self.segments:
            spans += [(version, offset + start, offset + end) for version, start, end in segment.versions]
            offset += len(segment.ids)
        return tuple(spans)

    @property
    def judged(self) -> Verdict:
        """The verdict, once the sample is verified."""
        assert self.verdict is not None
        return self.verdict

    @property
    def routed(self) -> Route:
        """The route, once the sample is routed."""
        assert self.route is not None
        return self.route

    @property
    def _policy_segments(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.author == "policy"]


SampleKey = tuple[str, int]  # prompt id, index in its group
Group = tuple[Sample, ...]  # the samples of one prompt, by index


class PartialGroup(_Record):
    """A partially sampled group: finished and aborted responses so far."""

    prompt: Prompt
    samples: tuple[Sample, ...] = ()
