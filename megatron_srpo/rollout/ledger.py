"""Write-ahead log of finished samples: a resumed run neither resamples nor skips any.

    RUN/ledger/step_000007.rank_00000.jsonl    this rank's finished samples of a step; a line: those that the
                                               engine delivered together
               step_000007.carried.jsonl       left over from the step before: groups, partial rollouts

A resumed run recovers the samples of the step after its checkpoint, partial groups included: the checkpoint
has their weights. The weights of later steps are lost: these steps are discarded and sampled again.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from pydantic import BaseModel, ValidationError

from megatron_srpo.data.records import PartialGroup, Sample, SampleKey
from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.layout import Layout

_NAME = re.compile(r"step_(\d+)\.(rank_\d+|carried)\.jsonl")


class _Line(BaseModel):
    """Finished samples that are recovered all together or not at all."""

    round: int
    samples: tuple[Sample, ...]


class Recovered(NamedTuple):
    """A finished sample of a stopped run, and the round (from 1) of its step that sampled it."""

    round: int
    sample: Sample


@dataclass(eq=False)
class Ledger:
    """The ledger of a run. Every rank writes its own samples."""

    directory: Path  # RUN/ledger
    layout: Layout
    keeps_samples: bool  # False for a run without checkpoints, which cannot be resumed

    def __post_init__(self) -> None:
        self._file: TextIO | None = None
        if self.layout.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Discard everything but the samples of the step after `step`."""
        if self.layout.rank == 0:
            self._remove(lambda other: other != step + 1)

    def carry(self, step: int, groups: Sequence[PartialGroup]) -> None:
        """Write the groups left over for `step`, which are equal on all ranks."""
        if self.layout.rank == 0 and self.keeps_samples:
            text = "".join(group.model_dump_json() + "\n" for group in groups)
            write_text(self._carried_file(step), text)

    def carried(self, step: int) -> list[PartialGroup]:
        """Read the groups left over for `step`; [] if there are none."""
        file = self._carried_file(step)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        return [PartialGroup.model_validate_json(line) for line in lines if line]

    def persist(self, step: int, round_number: int, samples: Sequence[Sample]) -> None:
        """Append finished samples that the engine delivered together in a round of `step`."""
        if not self.keeps_samples:
            return
        file = self.directory / f"step_{step:06d}.rank_{self.layout.rank:05d}.jsonl"
        if self._file is None or self._file.name != str(file):
            self.close()
            self._file = file.open("a", encoding="utf-8")
            if self._file.tell():
                self._file.write("\n")  # a killed run may have left an incomplete line
        self._file.write(_Line(round=round_number, samples=tuple(samples)).model_dump_json() + "\n")
        self._file.flush()

    def recovered(self, step: int) -> dict[SampleKey, Recovered]:
        """Return every rank's finished samples of a step. Incomplete lines are skipped."""
        found = {}
        for file in sorted(self.directory.glob(f"step_{step:06d}.rank_*.jsonl")):
            for text in file.read_bytes().split(b"\n"):
                with suppress(ValidationError):
                    line = _Line.model_validate_json(text)
                    for sample in line.samples:
                        found[sample.prompt.id, sample.index] = Recovered(line.round, sample)
        return found

    def saved(self, step: int) -> None:
        """Remove the samples up to `step`, which a checkpoint has. Called on one rank, at any time."""
        self._remove(lambda other: other <= step)

    def close(self) -> None:
        """Close the file that samples are appended to."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _carried_file(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}.carried.jsonl"

    def _remove(self, is_obsolete: Callable[[int], bool]) -> None:
        for file in self.directory.iterdir():
            match = _NAME.fullmatch(file.name)
            if match and is_obsolete(int(match[1])):
                file.unlink()
