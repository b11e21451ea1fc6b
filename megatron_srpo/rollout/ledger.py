"""Write-ahead log of finished samples: a resumed run neither resamples nor skips any.

    RUN/ledger/step_000007.rank_00000.jsonl    this rank's finished samples of a step; a line: those that the
                                               engine delivered together, and their checksum

A resumed run recovers the samples of the step after its checkpoint, partial groups included: the checkpoint
has their weights. The weights of later steps are lost: these steps are discarded and sampled again.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from pydantic import BaseModel, ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import PartialGroup, Sample, SampleKey
from megatron_srpo.distributed.layout import Layout

_CRC = re.compile(rb'\{"crc32":(\d+),')
_NAME = re.compile(r"step_(\d+)\.(rank_\d+|carried)\.jsonl")


class _Line(BaseModel, extra="forbid"):
    """Finished samples that are recovered all together or not at all."""

    round: int
    samples: tuple[Sample, ...]

    @classmethod
    def read(cls, text: bytes) -> "_Line":
        """Parse a line and check its checksum, which lines of older versions lack; raise ValueError."""
        if (found := _CRC.match(text)) is not None:
            text = b"{" + text[found.end() :]
            if zlib.crc32(text) != int(found[1]):
                raise ValueError("its content has changed since it was written (CRC-32)")
        return cls.model_validate_json(text)

    def write(self) -> str:
        """Return the line, with its checksum as the first field."""
        text = self.model_dump_json()
        return f'{{"crc32":{zlib.crc32(text.encode())},{text[1:]}\n'


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

    def carried(self, step: int) -> str:
        """Return what a run of an older version has left over for `step`; newer ones: in the checkpoint."""
        file = self.directory / f"step_{step:06d}.carried.jsonl"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

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
        self._file.write(_Line(round=round_number, samples=tuple(samples)).write())
        self._file.flush()

    def recovered(self, step: int) -> dict[SampleKey, Recovered]:
        """Return every rank's finished samples of a step. Incomplete and damaged lines are skipped."""
        found = {}
        for file in sorted(self.directory.glob(f"step_{step:06d}.rank_*.jsonl")):
            for text in file.read_bytes().split(b"\n"):
                with suppress(ValueError):  # pydantic's, too
                    line = _Line.read(text)
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

    def _remove(self, is_obsolete: Callable[[int], bool]) -> None:
        for file in self.directory.iterdir():
            match = _NAME.fullmatch(file.name)
            if match and is_obsolete(int(match[1])):
                file.unlink()


def carried_text(groups: Sequence[PartialGroup]) -> str:
    """Return groups left over for a step as JSON lines."""
    return "".join(group.model_dump_json() + "\n" for group in groups)


def carried_groups(text: str, where: str) -> list[PartialGroup]:
    """Read `carried_text`; raise ConfigError if a line, of a file called `where`, is damaged."""
    groups = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            groups += [PartialGroup.model_validate_json(line)] if line else []
        except ValidationError as error:
            problem = f"is damaged ({error.errors()[0]['msg']}); remove it to sample its groups again"
            raise ConfigError(f"{where}:{number}: {problem}") from None
    return groups
