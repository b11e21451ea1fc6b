"""rollouts/step_NNNNNN.tokens.jsonl: values of the loss for each token of a few samples, as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Group, Sample, SampleKey
from megatron_srpo.data.rollout_file import step_file
from megatron_srpo.distributed.files import read_jsonl, write_text


def choose(groups: Sequence[Group], count: int) -> list[SampleKey]:
    """Choose `count` samples: in turn distilled, failed without a teacher, correct; of many prompts."""
    kinds: tuple[list[Sample], ...] = ([], [], [])
    for sample in chain.from_iterable(groups):
        is_distilled = sample.routed.distillation_weight > 0
        kinds[0 if is_distilled else 2 if sample.judged.correct else 1].append(sample)
    turns = (_prompt_after_prompt(kind) for kind in kinds)
    chosen = [sample for turn in zip_longest(*turns) for sample in turn if sample is not None]
    return [(sample.prompt.id, sample.index) for sample in chosen[:count]]


def _prompt_after_prompt(samples: Sequence[Sample]) -> list[Sample]:
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt.id, []).append(sample)
    return [sample for sample in chain.from_iterable(zip_longest(*by_prompt.values())) if sample is not None]


def tokens_file(folder: Path, step: int) -> Path:
    """Return the path of a step's token values in a run folder."""
    return step_file(folder, step).with_suffix(".tokens.jsonl")


Decode = Callable[[Sequence[int]], str]  # token ids to text
Rows = Sequence[Mapping[str, Any]]


def write_tokens(rows: Rows, groups: Sequence[Group], decode: Decode, folder: Path, step: int) -> None:
    """Write the rows of `TokenValues.gather`, each token id replaced by its text, in one atomic file."""
    ids_of = {(sample.prompt.id, sample.index): sample.policy_ids for group in groups for sample in group}

    @cache
    def text(token: int) -> str:
        return decode([token])

    lines = []
    for row in rows:
        tokens = {"tokens": [text(token) for token in ids_of[row["prompt_id"], row["index"]]]}
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
        return {(row["prompt_id"], row["index"]): row for row in found.rows}
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{file}: {error}; remove the file, which nothing else needs") from None
