"""The data of one training step, in the order it is born: Prompt, Sample, Verdict, Route.

All records are frozen; a later phase returns copies that carry one field more. One `Sample` is one line of
`rollouts/step_NNNNNN.jsonl`, and the same line is what ranks exchange and what replay reads.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(_Record):
    """One question as the policy sees it."""

    id: str = Field(
        description="task/split/…, unique in a run: a question's next epoch is another prompt; the same for the same seed"
    )
    task: str = Field(description="the task's name; says which verifier judges the response")
    messages: tuple[dict[str, str], ...] = Field(description="chat messages: role, content")
    answer: str = Field(description="ground truth, read by the verifier alone")
    feedback: str | None = Field(
        default=None, description="what the environment says of a failed attempt, from the data"
    )
    ids: tuple[int, ...] = Field(default=(), description="token ids, generation header included")


class Verdict(_Record):
    """What the verifier says of one response."""

    reward: float = Field(allow_inf_nan=False)
    correct: bool = Field(description="c_i of METHOD.md: reward >= 0.5")
    format_ok: bool
    feedback: str | None = Field(
        default=None, description="what the environment says of this attempt; never the ground truth"
    )
    verifier_failed: str | None = Field(
        default=None,
        description="why nobody could judge it: timeout, died, memory, or error: and what the verifier raised",
    )
    excluded: bool = Field(
        default=False, description="takes no part in its group: neither learns nor counts nor is shown"
    )

    @model_validator(mode="after")
    def _correct_by_its_reward(self):
        if self.correct != (self.reward >= 0.5):
            raise ValueError(
                f"correct: {self.correct}, but reward is {self.reward}; a response is correct from 0.5 on"
            )
        return self


class Route(_Record):
    """What the algorithm makes of one sample; the two weights are z^GRPO and z^SDPO (METHOD.md §3)."""

    branch: Literal["grpo", "sdpo", "mixed", "none"]
    policy_weight: float
    distillation_weight: float
    advantage: float
    sibling: int | None = Field(
        default=None, description="index in the group of the sibling shown to the teacher"
    )
    teacher_ids: tuple[int, ...] | None = Field(default=None, description="the teacher's longer prompt")
    no_teacher: Literal["no_correct_sibling", "nothing_to_show"] | None = None
    demonstration_cut: bool = Field(default=False, description="the sibling's text was shortened to fit")


class Sample(_Record):
    """One rollout.

    `logprobs[t]` is the engine's log-probability (nats) of `response_ids[t]` at the rollout temperature.
    """

    prompt: Prompt
    index: int = Field(description="place in its group, 0 .. samples_per_prompt - 1")
    response_ids: tuple[int, ...] = Field(min_length=1)
    logprobs: tuple[float, ...]
    versions: tuple[tuple[str, int, int], ...] = Field(
        description="half-open spans (weight version, start, end)"
    )
    finish_reason: Literal["stop", "length", "abort"]
    text: str = Field(
        default="", description="the response decoded, for verifiers and people; never tokenised again"
    )
    verdict: Verdict | None = None
    route: Route | None = None

    @model_validator(mode="after")
    def _one_logprob_a_token(self):
        if len(self.logprobs) != len(self.response_ids):
            raise ValueError(f"{len(self.response_ids)} response_ids but {len(self.logprobs)} logprobs")
        return self


SampleKey = tuple[str, int]  # prompt id, index in its group
Group = tuple[Sample, ...]  # the samples of one prompt, by index


class Unfinished(_Record):
    """A prompt that is not yet a group: what has been sampled of it, whole responses and broken-off ones
    ("abort").
    """

    prompt: Prompt
    samples: tuple[Sample, ...] = ()
