"""Generate the folder of a run with large samples, for the benchmark and the tests of the report."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.observe.tokens import choose, write_tokens

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart" / "config.yaml"
VOCABULARY = 151_936
PROMPT_TOKENS = 512
TEXT = "so the sum of both sides is x = 2, and therefore we have that f(x) in [0, 1) holds"
COLUMNS = (
    "loss grad_norm lr policy_entropy teacher_entropy teacher_entropy_p10 teacher_entropy_p50"
    " teacher_entropy_p90 distillation_divergence entropy_weight_mean entropy_weight_std engine_logprob_gap"
    " engine_logprob_gap_max importance_mean importance_clip_share teacher_distance teacher_followed"
    " reward_mean pass_rate response_tokens_mean truncated_share format_rate verifier_failed_share"
    " sdpo_sample_share sdpo_token_share teacherless_failed_share zero_advantage_share staleness_mean seconds"
    " seconds_rollout seconds_verify seconds_teacher seconds_update seconds_publish seconds_checkpoint"
)


def make_group(step: int, number: int, size: int, tokens: int) -> Group:
    """Return a verified and routed group of `size` responses of `tokens` tokens."""
    rng = np.random.default_rng((step, number))
    messages = ({"role": "user", "content": " ".join(rng.choice(TEXT.split(), PROMPT_TOKENS))},)
    ids = tuple(rng.integers(VOCABULARY, size=min(tokens, PROMPT_TOKENS)).tolist())
    prompt = Prompt(id=f"{step}/{number}", task="made-up", messages=messages, answer="7", ids=ids)
    group = []
    for index in range(size):
        response = tuple(rng.integers(VOCABULARY, size=tokens).tolist())
        logprobs = tuple((-rng.exponential(size=tokens)).astype(np.float32).tolist())
        is_distilled = index % 2 == 1
        route = Route(
            branch="sdpo" if is_distilled else "grpo",
            policy_weight=float(not is_distilled),
            distillation_weight=float(is_distilled),
            advantage=0.5 - is_distilled,
            sibling=0 if is_distilled else None,
            teacher_ids=(*ids, *response) if is_distilled else None,
        )
        sample = Sample(
            prompt=prompt,
            index=index,
            segments=(Segment(ids=response, logprobs=logprobs, versions=((str(step - 1), 0, tokens),)),),
            finish_reason="stop",
            text=" ".join(rng.choice(TEXT.split(), tokens)),
            verdict=Verdict(reward=1 - is_distilled, correct=not is_distilled, format_ok=True),
            route=route,
        )
        group.append(sample)
    return tuple(group)


def token_values(key: tuple[str, int], tokens: int) -> dict[str, Any]:
    """Return values of a sample's tokens, in the form of `TokenValues.gather`."""
    rng = np.random.default_rng(key[1])
    numbers = {
        name: [float(f"{value:.5g}") for value in rng.exponential(size=tokens)]
        for name in ("logprob", "teacher_logprob", "entropy", "teacher_entropy", "divergence", "weight")
    }
    tops: dict[str, Any] = {}
    for name in ("top", "teacher_top"):
        likeliest = rng.integers(VOCABULARY, size=(tokens, 5)).tolist()
        values = (-rng.exponential(size=(tokens, 5))).tolist()
        tops[name] = [
            [[token, float(f"{value:.5g}")] for token, value in zip(*place, strict=True)]
            for place in zip(likeliest, values, strict=True)
        ]
    ids = rng.integers(VOCABULARY, size=tokens).tolist()
    return {"prompt_id": key[0], "index": key[1], "tokens": ids, **numbers, **tops}


def make_run(
    folder: Path, steps: int, full: int, prompts: int, size: int, tokens: int, valued: int = 8
) -> list[int]:
    """Write the folder of a run with `full` complete steps, the others thin; return the complete ones.

    A complete step has `prompts` groups of `size` responses of `tokens` tokens, `valued` of them with token
    values; another step has one short response.
    """
    (folder / "rollouts").mkdir(parents=True)
    overrides = [f"logging.dir={folder}", f"train.steps={steps}", f"rollout.prompts_per_step={prompts}"]
    save_config(
        load_config(CONFIG, [*overrides, f"rollout.samples_per_prompt={size}"]),
        folder / "config.yaml",
    )
    rng, large = random.Random(0), [round(steps * (place + 1) / full) for place in range(full)]
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"step": step, **{name: rng.random() for name in COLUMNS.split()}}
            row |= {"updates": 1, "updates_skipped": 0, "tokens": 2_000_000, "alarms": []}
            out.write(json.dumps(row | {"weight_version": str(step - 1)}) + "\n")
            if step % 100 == 0:
                score = {"avg@16": rng.random(), "pass@16": rng.random(), "avg_low": 0.4, "avg_high": 0.6}
                scores = {f"eval/made-up/{name}": value for name, value in score.items()}
                out.write(json.dumps({"step": step, **scores}) + "\n")
    for step in sorted({*range(1, steps + 1)} - {*large}):
        dump([make_group(step, 0, 1, 8)], folder / "rollouts", step)
    for step in large:
        groups = [make_group(step, number, size, tokens) for number in range(prompts)]
        dump(groups, folder / "rollouts", step)
        values = [token_values(key, tokens) for key in choose(list(map(outline, groups)), valued)]
        if values:
            write_tokens(values, lambda ids: f"t{ids[0]}", folder / "rollouts", step)
    return large


def link_steps(folder: Path, large: list[int], steps: int) -> None:
    """Replace the thin steps by hard links to complete ones, every tenth with token values."""
    for step in sorted({*range(1, steps + 1)} - {*large}):
        source = large[step % len(large)]
        for suffix in (".jsonl", ".bin", ".tokens.jsonl") if step % 10 == 0 else (".jsonl", ".bin"):
            file = folder / f"step_{step:06d}{suffix}"
            file.unlink(missing_ok=True)
            if (folder / f"step_{source:06d}{suffix}").exists():
                os.link(folder / f"step_{source:06d}{suffix}", file)
