"""Reading a run's folder back, also one that a kill has cut off: what is whole is read, what is not is said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.data.rollout_file import step_file

_STEP = re.compile(r"step_(\d{6,})\.jsonl")


@dataclass
class RunFolder:
    """steps, evaluations: the rows of metrics.jsonl. config: as run. problems: lines that could not be read."""

    path: Path
    config: Config
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Raises ConfigError when `path` is not a run's folder."""
        file = path / "metrics.jsonl"
        if not file.is_file():
            raise ConfigError(f"{path}: is not a run's folder: there is no metrics.jsonl in it")
        try:
            config = Config.model_validate(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
            raise ConfigError(
                f"{path / 'config.yaml'}: cannot be read as a run's configuration: {error}"
            ) from None
        run = cls(path, config, [], [])
        for row in run._lines(file):
            if isinstance(row.get("step"), int):
                (run.steps if "pass_rate" in row else run.evaluations).append(row)
        return run

    @property
    def sampled_steps(self) -> list[int]:
        """The steps whose samples are there, in order."""
        folder = step_file(self.path, 0).parent
        found = (_STEP.fullmatch(file.name) for file in folder.iterdir()) if folder.name == "rollouts" else ()
        return sorted(int(match[1]) for match in found if match)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step's samples, in the order of the file. Raises ConfigError when there are none."""
        file = step_file(self.path, step)
        if not file.is_file():
            steps = self.sampled_steps
            held = f"{steps[0]} … {steps[-1]}" if steps else "none (logging.rollouts: false)"
            raise ConfigError(f"{self.path}: has no samples of step {step}; steps with samples: {held}")
        return self._lines(file)

    def _lines(self, file: Path) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            try:
                if line:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    rows.append(row)
            except ValueError as error:
                self.problems.append(f"{file}:{number}: not readable and left out: {error}")
        return rows
