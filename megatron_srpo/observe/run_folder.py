"""Read a run's folder, also after a kill: complete lines are read, damaged ones are reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Sample
from megatron_srpo.data.rollout_file import read_step, step_file
from megatron_srpo.distributed.files import JsonLines
from megatron_srpo.observe.metrics_file import read_rows

_STEP = re.compile(r"step_(\d{6,})\.jsonl")


@dataclass
class RunFolder:
    """A run's configuration, its rows of metrics.jsonl, and the lines that could not be read (`problems`)."""

    path: Path
    config: Config
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read config.yaml and metrics.jsonl; raise ConfigError if `path` is not a run's folder."""
        file = path / "metrics.jsonl"
        if not file.is_file():
            raise ConfigError(
                f"{path}: is not a run folder: it has no metrics.jsonl; expected one of train or sample"
            )
        try:
            config = Config.model_validate(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, UnicodeDecodeError, ValidationError, RecursionError) as error:
            problem = f"cannot be read as a run's configuration: {error}"
            raise ConfigError(f"{path / 'config.yaml'}: {problem}") from None
        run = cls(path, config, [], [])
        for row in run._kept(read_rows(file)).rows:
            (run.steps if "pass_rate" in row else run.evaluations).append(row)
        return run

    @property
    def sampled_steps(self) -> list[int]:
        """The steps whose samples were dumped, in order."""
        folder = step_file(self.path, 0).parent
        found = (_STEP.fullmatch(file.name) for file in folder.iterdir()) if folder.name == "rollouts" else ()
        return sorted(int(match[1]) for match in found if match)

    def samples(self, step: int) -> Iterator[dict[str, Any]]:
        """Return the rows of a step's samples, read one at a time; raise ConfigError if there are none."""
        file = step_file(self.path, step)
        if not file.is_file():
            steps = self.sampled_steps
            held = f"{steps[0]} … {steps[-1]}" if steps else "none (logging.rollouts: false)"
            raise ConfigError(f"{self.path}: has no samples of step {step}; steps with samples: {held}")
        return self._valid_samples(file)

    def _valid_samples(self, file: Path) -> Iterator[dict[str, Any]]:
        for line in read_step(file):
            place = f"{file}:{line.number}"
            try:
                if line.problem is not None:
                    self.problems.append(f"{place}: is damaged ({line.problem}) and left out")
                    continue
                sample = Sample.model_validate(line.row)
                if sample.verdict is None or sample.route is None:
                    raise ValueError("verdict or route is missing")
            except ValidationError as error:
                problem = error.errors()[0]
                field = ".".join(map(str, problem["loc"]))
                self.problems.append(
                    f"{place}: {field}: {problem['msg']}; is not a valid sample and left out"
                )
            except ValueError as error:
                self.problems.append(f"{place}: {error}; is not a valid sample and left out")
            else:
                yield sample.model_dump(mode="json")

    def _kept(self, found: JsonLines) -> JsonLines:
        self.problems += [f"{problem} and left out" for problem in found.problems]
        return found
