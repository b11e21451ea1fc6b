"""Plan and write the files of a Hugging Face folder: shards, index, config.json, tokenizer."""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.folder_files import companions
from megatron_srpo.model.hf_folder import HFFolder

SHARD_BYTES = 4 * 2**30

Announced = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def size_of(announced: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Return the size in bytes of a tensor of this dtype and shape."""
    dtype, shape = announced
    return prod(shape) * dtype.itemsize


def plan_shards(tensors: Announced, limit: int) -> dict[str, list[str]]:
    """Return {file name: names of its tensors}, at most `limit` bytes per file unless a tensor is larger."""
    sizes: Any = {name: size_of(announced) for name, announced in tensors.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    return split.filename_to_tensors


def write_companions(
    folder: Path, reference: HFFolder, tensors: Announced, shards: Mapping[str, list[str]]
) -> None:
    """Write all files except the shards: their index, and config and tokenizer files of `reference`."""
    try:
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(size_of(announced) for announced in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, file in companions(reference.path).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(file.read_bytes())
        write_config(folder, reference, tensors)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror}") from None


def write_config(folder: Path, reference: HFFolder, tensors: Announced) -> None:
    """Write the reference's config.json, with the dtype of most of the tensors' bytes."""
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for dtype, shape in tensors.values():
        bytes_by_dtype[dtype] += size_of((dtype, shape))
    dtype = bytes_by_dtype.most_common(1)[0][0]
    config = {key: value for key, value in reference.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
