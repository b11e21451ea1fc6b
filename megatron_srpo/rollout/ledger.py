"""What was drawn, sampled and trained on, written before it is needed: nothing is sampled twice or skipped
after a stop.

    RUN/ledger/events.jsonl                    drawn, filtered and trained (step, prompts), resumed (after
    which step)
               step_000007.rank_00000.jsonl    this rank's finished samples of a step, written while others
               still run; a line: what was
                                               made together
               step_000007.carried.jsonl       what the step before left over for it: groups, broken-off
               responses

After a stop the run goes on from a checkpoint. Samples of the step after it are used again, partial groups
included: they were made by weights the run had by then. Later steps were made by weights that are gone: they
are taken back, and drawn anew.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_srpo.data.records import Sample, Unfinished
from megatron_srpo.distributed.files import append_line, write_text
from megatron_srpo.distributed.layout import Layout

_NAME = re.compile(r"step_(\d+)\.(rank_\d+|carried)\.jsonl")


class _Made(BaseModel):
    """A line of finished samples."""

    round: int
    samples: tuple[Sample, ...]


class Ledger:
    """The ledger of the run in `directory`. Events are the first rank's; every rank keeps its own samples.

    keeps_samples: false for a run without checkpoints, which cannot be gone on with.
    """

    def __init__(self, directory: Path, layout: Layout, keeps_samples: bool):
        self.directory, self.layout, self.keeps_samples = directory, layout, keeps_samples
        self._file, self._events = None, threading.Lock()  # with overlap two threads write events
        if layout.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Take back all that came after `step`, but for the samples of the one that follows."""
        if self.layout.rank == 0:
            self._forget(lambda later: later != step + 1)
            if (self.directory / "events.jsonl").exists():
                self._event("resumed", step=step)

    def drawn(self, step: int, version: str, prompts: Sequence[str]) -> None:
        """All ranks' prompts that a step begins, before any is sampled."""
        self._event("drawn", step=step, weight_version=version, prompts=list(prompts))

    def filtered(self, step: int, prompts: Sequence[str]) -> None:
        """Prompts that were sampled for a step and left out: their groups say nothing."""
        if prompts:
            self._event("filtered", step=step, prompts=list(prompts))

    def trained(self, step: int, prompts: Sequence[str]) -> None:
        """All ranks' prompts whose samples have moved the weights in a step."""
        self._event("trained", step=step, prompts=list(prompts))

    def carry(self, step: int, unfinished: Sequence[Unfinished]) -> None:
        """What is left over for `step`, all ranks' alike."""
        if self.layout.rank == 0 and self.keeps_samples:
            text = "".join(one.model_dump_json() + "\n" for one in unfinished)
            write_text(self.directory / f"step_{step:06d}.carried.jsonl", text)

    def carried(self, step: int) -> list[Unfinished]:
        """What was left over for `step`."""
        file = self.directory / f"step_{step:06d}.carried.jsonl"
        return (
            [Unfinished.model_validate_json(line) for line in file.read_bytes().split(b"\n") if line]
            if file.exists()
            else []
        )

    def keep(self, step: int, number: int, samples: Sequence[Sample]) -> None:
        """Finished samples that were made together in round `number` of a step: all of them are used again,
        or none.
        """
        if not self.keeps_samples:
            return
        file = self.directory / f"step_{step:06d}.rank_{self.layout.rank:05d}.jsonl"
        if self._file is None or self._file.name != str(file):
            self.close()
            self._file = file.open("a", encoding="utf-8")
            if self._file.tell():
                self._file.write("\n")  # a kill may have left half a line
        self._file.write(_Made(round=number, samples=tuple(samples)).model_dump_json() + "\n")
        self._file.flush()

    def kept(self, step: int) -> dict[tuple[str, int], tuple[int, Sample]]:
        """Every rank's finished samples of a step, each with its round, by prompt id and index.

        A torn line is left out.
        """
        found = {}
        for file in sorted(self.directory.glob(f"step_{step:06d}.rank_*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValidationError):
                    made = _Made.model_validate_json(line)
                    found |= {
                        (sample.prompt.id, sample.index): (made.round, sample) for sample in made.samples
                    }
        return found

    def saved(self, step: int) -> None:
        """A checkpoint holds `step`: samples up to it will not be needed again.

        For one rank to say, any time.
        """
        self._forget(lambda earlier: earlier <= step)

    def _forget(self, is_past: Callable[[int], bool]) -> None:
        for file in self.directory.iterdir():
            match = _NAME.fullmatch(file.name)
            if match and is_past(int(match[1])):
                file.unlink()

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _event(self, event: str, **what: Any) -> None:
        if self.layout.rank == 0:
            with self._events:
                append_line(self.directory / "events.jsonl", json.dumps({"event": event, **what}))


def history(events: Iterable[str]) -> dict[int, dict[str, list[str]]]:
    """Every step that counts, {step: {"drawn", "filtered", "trained": prompts}}, from the lines of
    events.jsonl.
    """
    steps: dict[int, dict[str, list[str]]] = {}
    for line in events:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if event["event"] == "resumed":
            steps = {step: what for step, what in steps.items() if step <= event["step"]}
        else:
            step = steps.setdefault(event["step"], {"drawn": [], "filtered": [], "trained": []})
            step[event["event"]] += event["prompts"]
    return steps
