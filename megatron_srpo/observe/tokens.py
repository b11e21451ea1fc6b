"""rollouts/step_NNNNNN.tokens.jsonl: values of the loss for each token of a few samples, as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.records import SampleKey
from megatron_srpo.data.rollout_file import step_file
from megatron_srpo.distributed.files import read_jsonl, write_text

NUMBERS = ("logprob", "teacher_logprob", "entropy", "teacher_entropy", "divergence", "weight")


def choose(groups: Sequence[OutlineGroup], count: int) -> list[SampleKey]:
    """Choose `count` trained samples: in turn distilled, failed without a teacher, correct."""
    kinds: tuple[list[Outline], ...] = ([], [], [])
    for sample in chain.from_iterable(groups):
        if not sample.routed.teaches:
            continue
        is_distilled = sample.routed.distillation_weight > 0
        kinds[0 if is_distilled else 2 if sample.judged.correct else 1].append(sample)
    turns = (_prompt_after_prompt(kind) for kind in kinds)
    chosen = [sample for turn in zip_longest(*turns) for sample in turn if sample is not None]
    return [sample.key for sample in chosen[:count]]


def _prompt_after_prompt(samples: Sequence[Outline]) -> list[Outline]:
    by_prompt: dict[str, list[Outline]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_id, []).append(sample)
    return [sample for sample in chain.from_iterable(zip_longest(*by_prompt.values())) if sample is not None]


def tokens_file(folder: Path, step: int) -> Path:
    """Return the path of a step's token values in a run folder."""
    return step_file(folder, step).with_suffix(".tokens.jsonl")


Decode = Callable[[Sequence[int]], str]  # token ids to text
Rows = Sequence[Mapping[str, Any]]


def write_tokens(rows: Rows, decode: Decode, folder: Path, step: int) -> None:
    """Write the rows of `TokenValues.gather`, each token id replaced by its text, in one atomic file."""

    @cache
    def text(token: int) -> str:
        return decode([token])

    lines = []
    for row in rows:
        tokens = {"tokens": [text(token) for token in row["tokens"]]}
        tops: dict[str, Any] = {}
        for key in ("top", "teacher_top"):
            if key in row:
                tops[key] = [[[text(token), logprob] for token, logprob in place] for place in row[key]]
        lines.append(json.dumps({"step": step, **row, **tokens, **tops}, ensure_ascii=False) + "\n")
    write_text(tokens_file(folder, step), "".join(lines))


def read_tokens(folder: Path, step: int) -> dict[SampleKey, dict[str, Any]]:
    """Read the rows of a step, by sample, {} if none were written; raise ConfigError if a line is damaged."""
    file = tokens_file(folder, step)
    found = read_jsonl(file)
    try:
        if found.problems:
            raise ValueError(found.problems[0])
        for row, number in zip(found.rows, found.numbers, strict=True):
            _check_row(row, f"{file}:{number}")
        return {(row["prompt_id"], row["index"]): row for row in found.rows}
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; remove the file, which nothing else needs") from None


class _Row(BaseModel, strict=True, extra="allow"):
    """The types of a line; every list has an entry for each token."""

    prompt_id: str
    index: int
    tokens: list[str]
    __pydantic_extra__: dict[str, int | list[float | None] | list[list[list[str | float | None]]]]


def _check_row(row: dict[str, Any], where: str) -> None:
    """Raise ValueError if a value is not of its type."""
    try:
        _Row.model_validate(row)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"][:1]))
        raise ValueError(f"{where}: is damaged ({place}: {error.errors()[0]['msg']})") from None
    for key in ("top", "teacher_top", *NUMBERS):
        value = row.get(key, row["tokens"])
        fits = isinstance(value, list) and len(value) == len(row["tokens"])
        if fits and key in ("top", "teacher_top") and key in row:
            pairs = [pair for place in value if isinstance(place, list) for pair in place]
            fits = all(isinstance(place, list) for place in value) and all(
                len(pair) == 2 and isinstance(pair[0], str) and not isinstance(pair[1], str) for pair in pairs
            )
        elif fits and key in row:
            fits = not any(isinstance(one, list) for one in value)
        if not fits:
            raise ValueError(f"{where}: is damaged ({key}: expected an entry for each token)")
