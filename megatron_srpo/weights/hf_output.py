"""A Hugging Face folder's files: shards of bounded size, the index, config.json with the dtype, tokenizer
files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.hf_folder import HFFolder

SHARD_BYTES = 4 * 2**30

Announced = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def size_of(announced: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    dtype, shape = announced
    return prod(shape) * dtype.itemsize


def plan_shards(tensors: Announced, limit: int) -> dict[str, list[str]]:
    """{file name: names of its tensors}, in order, at most `limit` bytes a file (a larger tensor has a file
    of its own).
    """
    shards: list[list[str]] = []
    held = 0
    for name, announced in tensors.items():
        size = size_of(announced)
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


def write_companions(
    folder: Path, reference: HFFolder, tensors: Announced, shards: Mapping[str, list[str]]
) -> None:
    """Everything but the shards: the index where there are several, config, generation config and tokenizer
    of `reference`.
    """
    try:
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(size_of(announced) for announced in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in reference.path.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt", ".jinja", ".model")
                and not _is_of_weights(file.name)
            ):
                (folder / file.name).write_bytes(file.read_bytes())
        write_config(folder, reference, tensors)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror}") from None


def _is_of_weights(name: str) -> bool:
    """Whether the file speaks of the reference's own weights: an index, or what marks a converted folder as
    Megatron's.
    """
    return "safetensors" in name or name.endswith(".bin.index.json") or name == "metadata.json"


def write_config(folder: Path, reference: HFFolder, tensors: Announced) -> None:
    """config.json of `reference`, with the dtype that most of the tensors have."""
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for dtype, shape in tensors.values():
        bytes_by_dtype[dtype] += size_of((dtype, shape))
    dtype = bytes_by_dtype.most_common(1)[0][0]
    config = json.loads((reference.path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
