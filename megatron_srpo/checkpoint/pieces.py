"""The tensors of a checkpoint: each rank writes the pieces it holds, any layout reads what it needs.

A piece is a range of flat elements of one rank's part of a parameter. Its name in the rank's safetensors file
says all of it:

    kind | first Hugging Face name of the table's mapping | part / parts over tensor-parallel ranks | shape of the
    part | first element

Kinds: `policy` (the fp32 master weights), `exp_avg`, `exp_avg_sq`, `teacher`. Where reader and writer cut a
parameter alike over tensor-parallel ranks, a range is read as it lies in the files; otherwise through the
table (`model/mapping.py`): the parts' Hugging Face tensors are put together and cut anew. No pickle anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_srpo.checkpoint.folder import DamagedCheckpoint
from megatron_srpo.model.mapping import TensorMapping

GENERATOR = "rng|"  # before the names of a rank's random generators


class Piece(NamedTuple):
    """Where flat elements `start` … of a parameter's part belong; how many there are, the tensor itself
    says.
    """

    kind: str
    name: str
    part: int
    parts: int
    shape: tuple[int, ...]
    start: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return (
            f"{self.kind}|{self.name}|{self.part}/{self.parts}|{'x'.join(map(str, self.shape))}|{self.start}"
        )

    @classmethod
    def parse(cls, key: str) -> Piece:
        """The inverse of `key`. Raises ValueError."""
        kind, name, part, shape, start = key.split("|")
        number, parts = part.split("/")
        return cls(kind, name, int(number), int(parts), tuple(map(int, shape.split("x"))), int(start))


class SavedTensors:
    """All ranks' files of one checkpoint, opened together.

    Use in a `with` statement; methods raise DamagedCheckpoint.
    """

    def __init__(self, files: Iterable[Path]):
        self._stack = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[Piece, int, object]]] = {}
        self._files = []
        for file in files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
                self._files.append(opened)
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    if key.startswith(GENERATOR):
                        continue
                    piece = Piece.parse(key)
                    end = piece.start + opened.get_slice(key).get_shape()[0]
                    self._pieces.setdefault((piece.kind, piece.name), []).append((piece, end, opened))
            except (SafetensorError, OSError, ValueError) as error:
                raise DamagedCheckpoint(f"{file}: is damaged: {error}") from None

    def __enter__(self) -> SavedTensors:
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def kinds(self) -> set[str]:
        """What was saved."""
        return {kind for kind, _ in self._pieces}

    def generators(self, rank: int) -> dict[str, Tensor]:
        """The random states that rank `rank` saved, by name."""
        file = self._files[rank]
        return {
            key.removeprefix(GENERATOR): file.get_tensor(key)
            for key in file.keys()
            if key.startswith(GENERATOR)
        }  # noqa: SIM118

    def read(self, own: Piece, end: int, mapping: TensorMapping) -> Tensor:
        """Flat elements own.start … end - 1 of a rank's part of a parameter, in the dtype they were saved
        in.
        """
        pieces = self._of(own.kind, own.name)
        saved = pieces[0][0]
        if (saved.parts, saved.shape) == (own.parts, own.shape):
            return self._flat(pieces, own.part, own.start, end)
        whole = self.whole(own.kind, own.name, mapping)
        return mapping.cut(whole, own.part, own.parts, own.shape).reshape(-1)[own.start : end]

    def whole(self, kind: str, name: str, mapping: TensorMapping) -> list[Tensor]:
        """The Hugging Face tensors of a mapping, in the mapping's order; `name` is the first one's."""
        pieces = self._of(kind, name)
        saved = pieces[0][0]
        numel = torch.Size(saved.shape).numel()
        parts = [self._flat(pieces, part, 0, numel).view(saved.shape) for part in range(saved.parts)]
        return mapping.join(parts)

    def _of(self, kind: str, name: str) -> list:
        if (kind, name) not in self._pieces:
            raise DamagedCheckpoint(f"{kind} {name}: is not in the checkpoint")
        return self._pieces[kind, name]

    def _flat(self, pieces: list, part: int, start: int, end: int) -> Tensor:
        """Flat elements start … end - 1 of one part, from whichever files hold them."""
        found, covered = None, 0
        for piece, stop, opened in pieces:
            first, last = max(piece.start, start), min(stop, end)
            if piece.part == part and first < last:
                values = opened.get_slice(piece.key)[first - piece.start : last - piece.start]
                if found is None:
                    found = torch.empty(end - start, dtype=values.dtype)
                found[first - start : last - start] = values
                covered += last - first
        if found is None and start < end or covered != end - start:
            one = pieces[0][0]
            raise DamagedCheckpoint(
                f"{one.kind} {one.name}: {covered} of elements {start} … {end - 1} of part {part} are there"
            )
        return torch.empty(0) if found is None else found
