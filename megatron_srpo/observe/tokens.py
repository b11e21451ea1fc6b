"""rollouts/step_NNNNNN.tokens.jsonl: values of the loss for each token of a few samples, as text."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from types import NoneType
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.records import SampleKey
from megatron_srpo.data.rollout_file import step_file
from megatron_srpo.distributed.files import write_text

NUMBERS = ("logprob", "teacher_logprob", "entropy", "teacher_entropy", "divergence", "weight")
_TOPS = ("top", "teacher_top")


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
        for key in _TOPS:
            if key in row:
                tops[key] = [[[text(token), logprob] for token, logprob in place] for place in row[key]]
        lines.append(json.dumps({"step": step, **row, **tokens, **tops}, ensure_ascii=False) + "\n")
    write_text(tokens_file(folder, step), "".join(lines))


def read_tokens(folder: Path, step: int) -> Iterator[tuple[SampleKey, dict[str, Any]]]:
    """Yield the rows of a step with their samples, one at a time; none if no values were written.

    Raises:
        ConfigError: A line is damaged.
    """
    file = tokens_file(folder, step)
    for number, line in enumerate(file.open("rb") if file.is_file() else (), 1):
        try:
            row = json.loads(line, parse_constant=lambda name: None)
            if problem := _row_problem(row):
                raise ValueError(problem)
        except (ValueError, RecursionError) as error:
            where = f"{file}:{number}: is damaged ({error})"
            raise ConfigError(f"{where}; remove the file, which nothing else needs") from None
        yield (row["prompt_id"], row["index"]), row


def _row_problem(row: Any) -> str | None:
    """Return which value of a row is not of its type, or None."""
    if not isinstance(row, dict):
        return "not a JSON object"
    kinds = {"prompt_id": str, "index": int, "tokens": list}
    for key, kind in kinds.items():
        if type(row.get(key)) is not kind:
            return f"{key}: expected a value of type {kind.__name__}"
    if not _are(row["tokens"], str):
        return "tokens: expected texts"
    for key in (*_TOPS, *NUMBERS):
        column = row.get(key, row["tokens"])
        if type(column) is not list or len(column) != len(row["tokens"]):
            return f"{key}: expected an entry for each token"
        if key in row and not (_are_pairs(column) if key in _TOPS else _are(column, float, int, NoneType)):
            return f"{key}: an entry has a wrong type"
    return None


def _are_pairs(column: list) -> bool:
    """Return True if every entry is a list of [text, number or None]."""
    if not _are(column, list):
        return False
    pairs = [*chain.from_iterable(column)]
    if not _are(pairs, list) or set(map(len, pairs)) - {2}:
        return False
    return _are([text for text, _ in pairs], str) and _are(
        [number for _, number in pairs], float, int, NoneType
    )


def _are(values: list, *kinds: type) -> bool:
    return set(map(type, values)) <= {*kinds}
