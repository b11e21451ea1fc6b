"""Make samples and groups for unit tests, with every field in one place."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict


def make_segments(
    ids: Sequence[int], logprobs: Sequence[float], environment: Collection[int] = ()
) -> tuple[Segment, ...]:
    """Return a response of n tokens in segments.

    environment: positions of the environment's tokens.
    """
    segments = []
    for is_environment, run in groupby(range(len(ids)), lambda position: position in environment):
        positions = list(run)
        own = tuple(ids[position] for position in positions)
        if is_environment:
            segments.append(Segment(author="environment", ids=own))
        else:
            values = tuple(logprobs[position] for position in positions)
            segments.append(Segment(ids=own, logprobs=values, versions=(("0", 0, len(own)),)))
    return tuple(segments)


def make_sample(
    index: int = 0,
    correct: bool | None = None,
    prompt_id: str = "p",
    prompt_ids: Sequence[int] = (5, 6, 7),
    response_ids: Sequence[int] = (8, 9),
    logprobs: Sequence[float] | None = None,
    text: str = "",
    question: str = "What is it?",
    route: Route | None = None,
    environment: Collection[int] = (),
) -> Sample:
    """Return one sample, verified when `correct` is given.

    environment, logprobs: see `make_segments`.
    """
    return Sample(
        prompt=Prompt(
            id=prompt_id,
            task="made-up",
            messages=({"role": "user", "content": question},),
            answer="",
            ids=tuple(prompt_ids),
        ),
        index=index,
        segments=make_segments(response_ids, logprobs or [-1.0] * len(response_ids), environment),
        finish_reason="stop",
        text=text,
        verdict=None if correct is None else Verdict(reward=float(correct), correct=correct, format_ok=True),
        route=route,
    )


def make_group(correct: Sequence[bool], prompt_id: str = "p") -> Group:
    """Return a verified group; sample i wrote "answer <i>"."""
    return tuple(
        make_sample(index, bool(c), prompt_id, text=f"answer <{index}>") for index, c in enumerate(correct)
    )


def encode_bytes(messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of chat messages, one per UTF-8 byte, instead of a tokenizer's."""
    return list("".join(f"[{message['role']}]{message['content']}" for message in messages).encode())


def sample_rows(file: Path) -> list[dict[str, Any]]:
    """Read a file of samples without our records; each row also has its segments put together.

    Added: response_ids and loss_mask of all tokens after the prompt, policy_ids and logprobs of the policy's.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    for row in rows:
        authors = [s["author"] for s in row["segments"] for _ in s["ids"]]
        row["response_ids"] = [token for s in row["segments"] for token in s["ids"]]
        row["loss_mask"] = [author == "policy" for author in authors]
        row["policy_ids"] = [token for s in row["segments"] if s["author"] == "policy" for token in s["ids"]]
        row["logprobs"] = [value for s in row["segments"] for value in s["logprobs"]]
        row["versions"] = [span for s in row["segments"] for span in s["versions"]]
    return rows
