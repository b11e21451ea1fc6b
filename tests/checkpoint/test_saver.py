"""Test saving on ranks other than the first."""

from __future__ import annotations

import json
from types import SimpleNamespace

from megatron_srpo.checkpoint import saver
from megatron_srpo.config.schema import CheckpointSection


def test_a_rank_that_finds_the_disk_full_frees_space_for_its_note(tmp_path, monkeypatch):
    # The first rank waits for the note, forever if there is no space for it.

    def fill(folder, rank, slices):
        (folder / f"__{rank}_0.distcp").write_bytes(b"all there was")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_slices", fill)
    layout = SimpleNamespace(rank=1, broadcast=lambda value: value)
    made = saver.Saver(
        tmp_path / "checkpoints", CheckpointSection(async_save=False), layout, None, on_commit=print
    )
    made._start([], SimpleNamespace(step=1))
    (note,) = (file for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    assert "rank 1: [Errno 28] No space left" in json.loads(note.read_text())["error"]
