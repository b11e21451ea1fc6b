"""The samples of a report: complete steps of a run, spread over it, within a number of samples and bytes."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_srpo.data.rollout_file import policy_tokens, step_file
from megatron_srpo.observe.run_folder import RunFolder
from megatron_srpo.observe.tokens import NUMBERS, read_tokens, tokens_file

TEXT_CHARACTERS = 20_000  # of one response or message; longer ones are cut in the middle
TOKENS = 600  # of a sample with token values; the middle of longer ones is left out
_SHORTEST_TEXT = 2_000  # characters; in large steps, texts are cut down to it, so that more samples fit


class Selection(NamedTuple):
    """The samples of a run by step, their prompts, and what is missing."""

    steps: dict[int, list[dict[str, Any]]]
    prompts: list[dict[str, Any]]
    notes: list[str]


class _Step(NamedTuple):
    samples: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    size: int  # of both as JSON, in bytes
    is_complete: bool


def select_samples(run: RunFolder, samples: int, size: int, first_prompt: int) -> Selection:
    """Read as many steps as fit; those with token values first.

    Args:
        run: The run's folder.
        samples: Limit of the number of samples; of a larger first step, only so many are read.
        size: Limit of their size as JSON, in bytes.
        first_prompt: Number of the first prompt, which the samples refer to.
    """
    found = Selection({}, [], [])
    steps, rollout = run.sampled_steps, run.config.rollout
    with_tokens = {step for step in steps if tokens_file(run.path, step).is_file()}
    order = spread(sorted(with_tokens)) + spread([step for step in steps if step not in with_tokens])
    expected = min(samples * 2 // 5, len(steps) * rollout.prompts_per_step * rollout.samples_per_prompt)
    characters = max(_SHORTEST_TEXT, min(TEXT_CHARACTERS, size * 3 // (4 * max(1, expected))))
    for step in order:
        if not step_file(run.path, step).is_file():
            continue  # the run is in progress, and has just removed it (logging.rollouts_limit_gib)
        part = _read(run, step, samples, size, characters, first_prompt + len(found.prompts))
        if part.is_complete or not found.steps:
            found.steps[step] = part.samples
            found.prompts.extend(part.prompts)
            samples, size = samples - len(part.samples), size - part.size
        if not part.is_complete:
            break
    if len(found.steps) < len(steps):
        shown = f"this page has the samples of {len(found.steps)} of {len(steps)} steps"
        found.notes.append(f"{shown}; rollouts/ has all of them.")
    return found


def spread(steps: Sequence[int]) -> list[int]:
    """Order the steps so that any first few are spread over all: last, first, halves, quarters and so on."""
    if not steps:
        return []
    places, stride = [len(steps) - 1, 0], len(steps)
    while stride > 1:
        stride = (stride + 1) // 2
        places += range(0, len(steps), stride)
    return [steps[place] for place in dict.fromkeys(places)]


def _read(run: RunFolder, step: int, samples: int, size: int, characters: int, first_prompt: int) -> _Step:
    """Read a step, sample by sample, until it exceeds `samples` or `size`; texts of at most `characters`."""
    values = {key: _token_values(of_tokens) for key, of_tokens in read_tokens(run.path, step)}
    numbers: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    used = 0
    for place, row in enumerate(run.samples(step)):
        if len(found) >= samples or used >= size:
            return _Step(found, prompts, used, False)
        prompt = row["prompt"]
        if prompt["id"] not in numbers:
            numbers[prompt["id"]] = first_prompt + len(prompts)
            messages = [[one["role"], _cut(one["content"], characters)] for one in prompt["messages"]]
            answer = _cut(prompt["answer"], characters)
            prompts.append({"id": prompt["id"], "messages": messages, "answer": answer})
            used += len(json.dumps(prompts[-1]))
        sample = {"step": step, "number": place, "prompt": numbers[prompt["id"]]} | _sample(row, characters)
        sample |= values.get((prompt["id"], row["index"]), {})
        found.append(sample)
        used += len(json.dumps(sample))
    return _Step(found, prompts, used, True)


def _sample(row: dict[str, Any], characters: int) -> dict[str, Any]:
    verdict, route = row["verdict"], row["route"]
    return {
        "index": row["index"],
        "text": _cut(row["text"], characters),
        "tokens": policy_tokens(row),
        "finish": row["finish_reason"],
        "reward": short(verdict["reward"]),
        "correct": verdict["correct"],
        "format": verdict["format_ok"],
        "failure": verdict["verifier_failed"],
        "feedback": verdict["feedback"] and _cut(verdict["feedback"], characters),
        "branch": route["branch"],
        "advantage": short(route["advantage"]),
        "sibling": route["sibling"],
        "noTeacher": route["no_teacher"],
    }


def _token_values(row: dict[str, Any]) -> dict[str, Any]:
    """Return the values of at most `TOKENS` tokens, and the mean divergence of all."""
    columns = {key: row[key] for key in ("tokens", *NUMBERS, "top", "teacher_top") if key in row}
    known = [value for value in row.get("divergence", ()) if value is not None]
    found: dict[str, Any] = {"divergence": short(sum(known) / len(known))} if known else {}
    left_out, half = len(row["tokens"]) - TOKENS, TOKENS // 2
    if left_out > 0:
        gaps = {"tokens": f"[… {left_out} tokens left out …]", "top": [], "teacher_top": []}
        columns = {key: [*column[:half], gaps.get(key), *column[-half:]] for key, column in columns.items()}
        found["gap"] = half
    return {**found, "values": columns}


def _cut(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def short(value: float | None) -> float | None:
    """Round to five significant digits; None if the number is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
