"""Write made-up rollouts with random responses and verdicts of every kind of group.

The log-probabilities are those of an engine.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from samples import make_segments

from megatron_srpo.data.records import Prompt, Sample, Verdict
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.model.hf_folder import HFFolder

# c_i of each group's samples: mixed, lone correct, all wrong, all correct
MIXED = ([1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1])


@torch.no_grad()
def write_rollouts(
    path: Path,
    folder: HFFolder,
    model,
    verdicts=MIXED,
    steps: int = 3,
    seed: int = 0,
    longest: int = 40,
    turns: bool = False,
) -> Path:
    """Write `steps` files of len(verdicts) groups; prompts and responses differ much in length.

    Some responses have one token. The log-probabilities are those of the HF `model` in fp32, moved by up to
    0.9 nats so that importance weights differ from 1 and some are capped. turns: the environment wrote parts.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = folder.architecture.vocab_size
    for step in range(1, steps + 1):
        groups = []
        for number, correct in enumerate(verdicts):
            text = "Say " + "ha" * rng.choice((1, 3, 30))
            messages = ({"role": "user", "content": text},)
            prompt = Prompt(
                id=f"{step}/{number}",
                task="made-up",
                messages=messages,
                answer="",
                ids=tuple(folder.encode(list(messages))),
            )
            group = []
            for index, is_correct in enumerate(correct):
                length = 1 if rng.random() < 0.2 else rng.randrange(2, longest)
                response = torch.randint(3, vocabulary, (length,), generator=generator)
                ids = torch.cat([torch.tensor(prompt.ids), response])
                logprobs = (
                    model(ids[None])
                    .logits[0, len(prompt.ids) - 1 : -1]
                    .log_softmax(-1)
                    .gather(1, response[:, None])[:, 0]
                )
                logprobs = logprobs + 1.8 * (torch.rand(length, generator=generator) - 0.5)
                group.append(
                    Sample(
                        prompt=prompt,
                        index=index,
                        segments=make_segments(
                            response.tolist(), logprobs.tolist(), _environment(length, index) if turns else ()
                        ),
                        finish_reason="length",
                        text=folder.tokenizer.decode(
                            [t for t in response.tolist() if t < 259], skip_special_tokens=True
                        ),
                        verdict=Verdict(reward=float(is_correct), correct=bool(is_correct), format_ok=True),
                    )
                )
            groups.append(tuple(group))
        dump(groups, path, step)
    return path


def _environment(length: int, index: int) -> set[int]:
    """Return the positions of the environment: in the middle, or at both ends of the response."""
    third = length // 3
    if index % 2:
        return {*range(third), *range(length - third, length)}
    return set(range(third, 2 * third))
