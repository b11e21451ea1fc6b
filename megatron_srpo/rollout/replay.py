"""Read dumped rollouts as groups to train on."""

import itertools
import math
from pathlib import Path

from pydantic import ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.data.rollout_file import read_step, step_file
from megatron_srpo.model.hf_folder import HFFolder


def replay(folder: Path, step: int, samples_per_prompt: int, model: HFFolder) -> list[Group]:
    """Read the groups dumped for `step`, verified, without routes. Raises ConfigError with file and line."""
    file = step_file(folder, step)
    if not file.is_file():
        raise ConfigError(f"rollout.replay: {file} is missing; steps are replayed from 1 to train.steps")
    samples = []
    for line in read_step(file):
        where = f"{file}:{line.number}"
        try:
            if line.problem is not None:
                raise ValueError(line.problem)
            sample = Sample.model_validate(line.row)
            if not all(math.isfinite(logprob) for logprob in sample.logprobs):
                raise ValueError("logprobs: not all are finite numbers")
            if sample.verdict is None:
                raise ValueError("verdict: is missing; a replayed sample must have been verified")
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"])
            text = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}: {field}: {text}") from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        ids = (*sample.prompt.ids, *sample.response_ids)
        if not sample.prompt.ids or min(ids) < 0 or max(ids) >= model.architecture.vocab_size:
            problem = "prompt.ids are missing or an id is outside the model's vocabulary"
            raise ConfigError(f"{where}: {problem}")
        samples.append(sample.model_copy(update={"route": None}))
    if not samples:
        raise ConfigError(f"{file}: is empty; expected a sample on each line")
    groups = [tuple(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.prompt.id)]
    for group in groups:
        indices = [sample.index for sample in group]
        if indices != list(range(samples_per_prompt)):
            expected = f"0 to {samples_per_prompt - 1} (rollout.samples_per_prompt)"
            found = f"the group of {group[0].prompt.id} has samples {indices}"
            raise ConfigError(f"{file}: {found}, expected {expected}")
    return groups
