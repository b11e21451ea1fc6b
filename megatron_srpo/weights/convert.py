"""Convert between Hugging Face folders and torch_dist checkpoints tensor by tensor, without a model.

Each process writes its part to separate files; memory use is that of a few of the largest tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_srpo.distributed.byte_progress import ByteProgress
from megatron_srpo.distributed.files import FileError, atomic_directory
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.folder_files import companions
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights import safetensors_file, torch_dist
from megatron_srpo.weights.hf_output import SHARD_BYTES, plan_shards, size_of, write_companions, write_config
from megatron_srpo.weights.sources import CheckpointSlice, Tensors, checkpoint_slices, empty_objects


def to_megatron(
    source: Tensors,
    reference: HFFolder,
    output: Path,
    processes: Processes,
    dtype: torch.dtype | None = None,
    vocabulary_multiple: int = 16,
) -> None:
    """Write `source` as a torch_dist checkpoint, with the config.json of `reference`; all processes together.

    Args:
        source: The tensors, by HF name.
        reference: Folder with the model's config.json.
        output: A new or empty folder, created atomically.
        processes: The processes that share the work.
        dtype: Dtype to write; None keeps each tensor's own.
        vocabulary_multiple: Pads the vocabulary with zeros; megatron-core can load it with any other padding.

    Raises:
        FileError: If a file cannot be read or written.
        ConfigError: If the model is not supported.
    """
    architecture, shapes = reference.architecture, reference.architecture.tensor_shapes()
    parts = list(checkpoint_slices(architecture))
    dtypes = {name: dtype or source.dtype(name) for name in source.names()}
    _check_dtypes(parts, dtypes)
    tensors = {name: (dtypes[name], shapes[name]) for name in source.names()}
    sizes = [sum(size_of(tensors[name]) for name in part.names) for part in parts]
    mine = _share(sizes, processes)
    with (
        atomic_directory(output, processes) as folder,
        ByteProgress("Hugging Face → Megatron", sum(sizes[n] for n in mine), processes.rank == 0) as progress,
    ):
        writer = torch_dist.Writer(folder, processes.rank)

        def part_after_part() -> Iterator[Callable[[], None]]:
            for number in mine:
                part = parts[number]
                pieces = [_read(source, name, dtypes[name], progress) for name in part.names]
                merged = part.mapping.fusion.merge(pieces)
                if part.mapping.padded:
                    merged = _padded(merged, vocabulary_multiple)
                shape, start = (*part.stacks, *merged.shape), (*part.index, *[0] * merged.ndim)
                yield partial(writer.write, part.key, merged, shape, start)
                progress.advance(sizes[number])

        _write_behind(part_after_part())
        written = processes.gather(writer.close().to_json().encode())
        if processes.rank == 0:
            files = [torch_dist.RankFile.from_json(text.decode()) for text in written]
            torch_dist.write_metadata(folder, files, empty_objects(architecture))
            write_config(folder, reference, tensors)


def to_hf(
    source: Tensors, reference: HFFolder, output: Path, processes: Processes, dtype: torch.dtype | None = None
) -> None:
    """Write `source` as a Hugging Face folder, with `reference`'s configuration and tokenizer files.

    All processes together; see `to_megatron` for the arguments. Raises FileError or ConfigError.
    """
    companions(reference.path)  # raises before hours of writing
    tensors = {name: (dtype or source.dtype(name), source.shape(name)) for name in source.names()}
    total = sum(size_of(announced) for announced in tensors.values())
    shards = plan_shards(tensors, min(SHARD_BYTES, -(-total // processes.world_size)))
    files = list(shards)
    sizes = [sum(size_of(tensors[name]) for name in shards[file]) for file in files]
    mine = _share(sizes, processes)
    with (
        atomic_directory(output, processes) as folder,
        ByteProgress("Megatron → Hugging Face", sum(sizes[n] for n in mine), processes.rank == 0) as progress,
    ):

        def tensor_after_tensor() -> Iterator[Callable[[], object]]:
            for number in mine:
                names = shards[files[number]]
                announced = {name: tensors[name] for name in names}
                writer = safetensors_file.Writer(folder / files[number], announced)
                for name in names:
                    yield partial(writer.write, name, _read(source, name, tensors[name][0], progress))
                    progress.advance(size_of(tensors[name]))
                yield writer.close

        _write_behind(tensor_after_tensor())
        if processes.rank == 0:
            write_companions(folder, reference, tensors, shards)


def _write_behind(jobs: Iterable[Callable[[], object]]) -> None:
    """Run the jobs in order in a thread: one tensor is written while the next is read, without the GIL."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(lambda: None)
        for job in jobs:
            pending.result()
            pending = pool.submit(job)
        pending.result()


def _share(sizes: Sequence[int], processes: Processes) -> list[int]:
    """Return this process's items: largest first, each goes to the process with the smallest load."""
    loads, owners = [0] * processes.world_size, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return [number for number, owner in enumerate(owners) if owner == processes.rank]


def _check_dtypes(parts: Sequence[CheckpointSlice], dtypes: dict[str, torch.dtype]) -> None:
    """Raise FileError if a Megatron tensor would combine HF tensors of different dtypes."""
    seen: dict[str, tuple[torch.dtype, str]] = {}
    for part in parts:
        for name in part.names:
            dtype, first = seen.setdefault(part.key, (dtypes[name], name))
            if dtypes[name] != dtype:
                hint = f"both belong to {part.key}: choose one with --dtype float32 or bfloat16"
                raise FileError(f"{name} is {dtypes[name]} but {first} is {dtype}, and {hint}")


def _read(source: Tensors, name: str, dtype: torch.dtype, progress: ByteProgress) -> Tensor:
    """Read a tensor as `dtype`; warn about NaN and infinity."""
    tensor = source.tensor(name)
    if not torch.isfinite(tensor.sum()):  # ten times faster than checking each element
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            progress.warn(f"{name}: {wrong} of {tensor.numel()} elements are NaN or infinite")
    return tensor.to(dtype)


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[0] % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
