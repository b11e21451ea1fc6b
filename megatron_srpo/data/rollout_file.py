"""Rollouts on disk: one file per step, one JSON line per sample; people can read them, a run can replay.

Token ids and log-probabilities of a long sample (more than `INLINE_IDS` ids) are in a binary file next to it:

    rollouts/step_000001.jsonl   {"step": 1, "offset": 0, "crc32": 1234,
                                  "arrays": [["prompt.ids", "int32", 512], …], "prompt": {…}, …}
    rollouts/step_000001.bin     the arrays of all long samples, little-endian, one after the other

`offset` is the byte at which a sample's arrays begin, in the order of `arrays`: [field, dtype, length];
`crc32` is the checksum of these bytes. A log-probability that is no float32 makes its array float64.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_srpo.data.atomic import atomic_binary
from megatron_srpo.data.records import Group, Sample

INLINE_IDS = 1024  # of prompt, response and teacher's prompt; a sample with more has them in the binary file

_DTYPES = {"int32": np.dtype("<i4"), "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
_FIELD = re.compile(r"(prompt)\.(ids)|(route)\.(teacher_ids)|segments\.(\d+)\.(ids|logprobs)")
_ARRAYS = {"prompt": {"ids"}, "segments": {"__all__": {"ids", "logprobs"}}, "route": {"teacher_ids"}}


class EncodedSample(NamedTuple):
    """A sample as it is written: a JSON object without step and line end, and the bytes of its arrays."""

    line: bytes
    binary: bytes = b""


class StepLine(NamedTuple):
    """A line of a step's file, from 1: the sample's fields, or {} and what is wrong with the line."""

    number: int
    row: dict[str, Any]
    problem: str | None = None


def step_file(folder: Path, step: int) -> Path:
    """Return the file of step `step` (from 1), given a run folder or its folder of rollouts."""
    inner = folder / "rollouts"
    return (inner if inner.is_dir() else folder) / f"step_{step:06d}.jsonl"


def binary_file(file: Path) -> Path:
    """Return the file of the arrays, which exists if a sample in the step's `file` is long."""
    return file.with_suffix(".bin")


def dump(groups: Sequence[Group], folder: Path, step: int) -> None:
    """Write the step's samples atomically."""
    write_step(folder, step, map(encode_sample, itertools.chain.from_iterable(groups)))


def encode_sample(sample: Sample) -> EncodedSample:
    """Return what `write_step` writes for the sample."""
    route = sample.route
    values: dict[str, Sequence[float]] = {"prompt.ids": sample.prompt.ids}
    for place, segment in enumerate(sample.segments):
        values |= {f"segments.{place}.ids": segment.ids, f"segments.{place}.logprobs": segment.logprobs}
    if route is not None and route.teacher_ids is not None:
        values["route.teacher_ids"] = route.teacher_ids
    if sum(len(ids) for field, ids in values.items() if field.endswith("ids")) <= INLINE_IDS:
        return EncodedSample(json.dumps(sample.model_dump(mode="json"), ensure_ascii=False).encode())
    arrays = {field: _array(field, numbers) for field, numbers in values.items()}
    binary = b"".join(array.tobytes() for array in arrays.values())
    fields = [[field, array.dtype.name, len(array)] for field, array in arrays.items()]
    row = {"crc32": zlib.crc32(binary), "arrays": fields, **sample.model_dump(mode="json", exclude=_ARRAYS)}
    return EncodedSample(json.dumps(row, ensure_ascii=False).encode(), binary)


def _array(field: str, numbers: Sequence[float]) -> np.ndarray:
    if not field.endswith("logprobs"):
        return np.asarray(numbers, _DTYPES["int32"])
    exact = np.asarray(numbers, _DTYPES["float64"])
    rounded = exact.astype(_DTYPES["float32"])
    return rounded if np.array_equal(rounded, exact) else exact


def write_step(folder: Path, step: int, samples: Iterable[EncodedSample]) -> None:
    """Write the files of a step; the JSON lines exist only after the binary file that they refer to."""
    folder.mkdir(parents=True, exist_ok=True)
    file, samples = step_file(folder, step), list(samples)
    binary = binary_file(file)
    if binary.exists():  # of a run that was stopped: the old lines do not fit the new arrays
        file.unlink(missing_ok=True)
        binary.unlink()
    if any(sample.binary for sample in samples):
        with atomic_binary(binary) as out:
            out.writelines(sample.binary for sample in samples)
    offset = 0
    with atomic_binary(file) as out:
        for sample in samples:
            place = b' "offset": %d,' % offset if sample.binary else b""
            out.write(b'{"step": %d,%s %s\n' % (step, place, sample.line[1:]))
            offset += len(sample.binary)


def read_step(file: Path) -> Iterator[StepLine]:
    """Yield the samples of a step's file, one at a time, with their arrays; not yet validated."""
    binary = binary_file(file)
    with (
        file.open("rb") as lines,
        binary.open("rb") if binary.is_file() else nullcontext() as arrays,
    ):
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("expected a JSON object")
                row.pop("step", None)
                if "arrays" in row:
                    _insert_arrays(row, arrays, binary)
                yield StepLine(number, row)
            except (ValueError, RecursionError) as error:
                yield StepLine(number, {}, str(error))


def _insert_arrays(row: dict[str, Any], file: BinaryIO | None, path: Path) -> None:
    """Move the arrays that the row refers to into the row. Raises ValueError."""
    fields, crc32, offset = (row.pop(key, None) for key in ("arrays", "crc32", "offset"))
    if file is None:
        raise ValueError(f"{path.name}, which has its token ids, is missing")
    try:
        dtypes = [_DTYPES[dtype] for _, dtype, _ in fields]
        sizes = [dtype.itemsize * length for dtype, (_, _, length) in zip(dtypes, fields, strict=True)]
        targets = [_target(row, field) for field, _, _ in fields]
        if any(type(number) is not int or number < 0 for number in (offset, *(field[2] for field in fields))):
            raise ValueError("expected whole numbers")
        file.seek(0, 2)
        is_inside = offset + sum(sizes) <= file.tell()
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"arrays: is damaged ({error!r})") from None
    if not is_inside:
        raise ValueError(f"{path.name}, which has its token ids, has been cut short")
    file.seek(offset)
    content = file.read(sum(sizes))
    if zlib.crc32(content) != crc32:
        raise ValueError(f"{path.name}, which has its token ids, has changed since it was written (CRC-32)")
    place = 0
    for (holder, key), dtype, size in zip(targets, dtypes, sizes, strict=True):
        holder[key] = np.frombuffer(content[place : place + size], dtype).tolist()
        place += size


def _target(row: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """Return the object and the key that `field` names."""
    found = _FIELD.fullmatch(field)
    if found is None:
        raise ValueError(f"unknown field {field[:40]}")
    section, key, other, other_key, number, segment_key = found.groups()
    holder = row["segments"][int(number)] if number is not None else row[section or other]
    if not isinstance(holder, dict):
        raise ValueError(f"{field} is not in an object")
    return holder, segment_key or key or other_key


def policy_tokens(row: dict[str, Any]) -> int:
    """Count the policy's tokens in a sample, given as a JSON object, also of an older run."""
    if "response_ids" in row:
        return len(row["response_ids"])
    return sum(len(segment["ids"]) for segment in row["segments"] if segment["author"] == "policy")
