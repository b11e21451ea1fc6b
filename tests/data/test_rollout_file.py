"""Test the two forms of a dumped sample: all in its JSON line, or long arrays in a binary file."""

from __future__ import annotations

import json
import os
import random
import zlib

import numpy as np
import pytest
from samples import make_sample
from tables import each_row

from megatron_srpo.data import rollout_file
from megatron_srpo.data.records import Route, Sample, Segment
from megatron_srpo.data.rollout_file import (
    INLINE_IDS,
    EncodedSample,
    binary_file,
    dump,
    encode_sample,
    read_step,
    step_file,
    write_step,
)


def long_sample(index=0, prompt=20, response=2000, teacher=None, exact=False, segments=1):
    """Return a sample of random ids; exact: its log-probabilities are no float32 numbers."""
    rng = random.Random(index)

    def ids(count):
        return tuple(rng.randrange(2**31) for _ in range(count))

    logprobs = [-rng.expovariate(1) for _ in range(response)]
    if not exact:
        logprobs = np.float32(logprobs).tolist()
    made = make_sample(index, True, prompt_ids=ids(prompt), response_ids=ids(response), logprobs=logprobs)
    parts = [*made.segments]
    for _ in range(segments - 1):
        parts += [Segment(author="environment", ids=ids(3)), made.segments[0]]
    route = Route(branch="sdpo", policy_weight=0, distillation_weight=1, advantage=0, teacher_ids=teacher)
    return made.model_copy(update={"segments": tuple(parts), "route": route})


SAMPLES = [
    long_sample(0),
    make_sample(1, True),
    long_sample(2, exact=True),
    long_sample(3, response=3, teacher=tuple(range(INLINE_IDS))),
    long_sample(4, segments=3),
    long_sample(5, prompt=INLINE_IDS, response=1),
]


def read(folder, step=1):
    lines = list(read_step(step_file(folder, step)))
    assert [line.problem for line in lines] == [None] * len(lines)
    return [Sample.model_validate(line.row) for line in lines]


def test_both_forms_are_read_as_they_were_written(tmp_path):
    dump([tuple(SAMPLES)], tmp_path, 1)
    assert read(tmp_path) == SAMPLES
    rows = [json.loads(line) for line in step_file(tmp_path, 1).read_text().splitlines()]
    assert ["arrays" in row for row in rows] == [True, False, True, True, True, True]
    assert rows[1]["segments"][0]["ids"] == [8, 9] and "ids" not in rows[0]["segments"][0]


def test_the_layout_is_as_documented(tmp_path):
    # The arrays are read by their description alone.
    dump([tuple(SAMPLES)], tmp_path, 1)
    content = binary_file(step_file(tmp_path, 1)).read_bytes()
    row = json.loads(step_file(tmp_path, 1).read_text().splitlines()[2])
    assert row["offset"] == 4 * 20 + 8 * 2000  # after the arrays of the first sample
    fields = {"prompt.ids": ("int32", 20), "segments.0.ids": ("int32", 2000)}
    fields["segments.0.logprobs"] = ("float64", 2000)
    assert {name: (dtype, length) for name, dtype, length in row["arrays"]} == fields
    sizes = [np.dtype(dtype).itemsize * length for _, dtype, length in row["arrays"]]
    own = content[row["offset"] : row["offset"] + sum(sizes)]
    assert zlib.crc32(own) == row["crc32"]
    assert np.frombuffer(own[: sizes[0]], "<i4").tolist() == [*SAMPLES[2].prompt.ids]
    assert np.frombuffer(own[-sizes[2] :], "<f8").tolist() == [*SAMPLES[2].logprobs]


def test_the_limit_of_inline_ids(tmp_path):
    short = long_sample(prompt=24, response=INLINE_IDS - 24)
    longer = long_sample(prompt=25, response=INLINE_IDS - 24)
    assert encode_sample(short).binary == b"" and encode_sample(longer).binary
    dump([(short,)], tmp_path, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001.jsonl"]


def test_lines_of_other_ranks_are_written_unparsed(tmp_path):
    # Two ranks encode their own samples; the first one receives bytes.
    received = [EncodedSample(*map(bytes, encode_sample(sample))) for sample in SAMPLES]
    write_step(tmp_path / "one", 7, iter(received))
    dump([tuple(SAMPLES)], tmp_path / "two", 7)
    for name in ("step_000007.jsonl", "step_000007.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert read(tmp_path / "one", 7) == SAMPLES


@each_row(
    "change, said",
    [
        (lambda row: row.update(crc32=5), "has changed since it was written (CRC-32)"),
        (lambda row: row.update(offset=row["offset"] + 4), "has changed since it was written (CRC-32)"),
        (lambda row: row.update(offset=-4), "arrays: is damaged"),
        (lambda row: row.update(offset="0"), "arrays: is damaged"),
        (lambda row: row.update(offset=10**9), "has been cut short"),
        (lambda row: row.pop("offset"), "arrays: is damaged"),
        (lambda row: row.update(arrays=5), "arrays: is damaged"),
        (lambda row: row["arrays"][0].pop(), "arrays: is damaged"),
        (lambda row: row["arrays"][0].__setitem__(0, "prompt.task"), "unknown field prompt.task"),
        (lambda row: row["arrays"][0].__setitem__(1, "object"), "arrays: is damaged"),
        (lambda row: row["arrays"][0].__setitem__(2, -1), "arrays: is damaged"),
        (lambda row: row["arrays"][0].__setitem__(2, 1.5), "arrays: is damaged"),
        (lambda row: row["arrays"][0].__setitem__(2, 10**15), "has been cut short"),
        (lambda row: row["arrays"][1].__setitem__(0, "segments.9.ids"), "arrays: is damaged"),
        (lambda row: row.update(segments="text"), "arrays: is damaged"),
        (lambda row: row.update(segments=None), "arrays: is damaged"),
    ],
)
def test_damaged_references_are_problems_of_their_line(tmp_path, change, said):
    dump([tuple(SAMPLES)], tmp_path, 1)
    file = step_file(tmp_path, 1)
    lines = file.read_text().splitlines()
    row = json.loads(lines[2])
    change(row)
    file.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")
    problems = [line.problem for line in read_step(file)]
    assert said in problems.pop(2) and problems == [None] * 5


def test_damaged_and_missing_binary_files_are_problems(tmp_path):
    dump([tuple(SAMPLES)], tmp_path, 1)
    file, binary = step_file(tmp_path, 1), binary_file(step_file(tmp_path, 1))
    content = binary.read_bytes()
    binary.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:-1])
    problems = [line.problem for line in read_step(file)]
    assert "CRC-32" in problems[0] and "cut short" in problems[5] and problems[1:5] == [None] * 4
    binary.unlink()
    assert "step_000001.bin, which has its token ids, is missing" in str(next(read_step(file)).problem)


@pytest.mark.parametrize("broken", ["unlink", "open", "write", "fsync", "replace", "replace twice"])
def test_a_kill_while_a_step_is_written_again_leaves_no_mixture(tmp_path, monkeypatch, broken):
    # A resumed run writes a step again; whatever is interrupted, lines fit the binary file or are not there.
    dump([tuple(SAMPLES)], tmp_path, 1)
    other = [long_sample(number + 10) for number in range(3)]
    encoded = [encode_sample(sample) for sample in other]
    left = [2 if broken == "replace twice" else 1]

    def kill(original):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    if broken in ("unlink", "replace", "replace twice"):
        name = broken.split()[0]
        monkeypatch.setattr(rollout_file.Path, name, kill(getattr(rollout_file.Path, name)))
    elif broken == "write":
        encoded[1] = EncodedSample(encoded[1].line, 5)  # type: ignore[arg-type]
    else:
        monkeypatch.setattr(os, broken, kill(getattr(os, broken)))
    with pytest.raises((KeyboardInterrupt, TypeError)):
        write_step(tmp_path, 1, encoded)
    monkeypatch.undo()
    if step_file(tmp_path, 1).exists():
        assert read(tmp_path) in (SAMPLES, other)
    write_step(tmp_path, 1, map(encode_sample, other))
    assert read(tmp_path) == other
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_000001.bin", "step_000001.jsonl"]


def test_a_step_that_is_written_again_without_long_samples_has_no_binary_file(tmp_path):
    dump([tuple(SAMPLES)], tmp_path, 1)
    dump([(SAMPLES[1],)], tmp_path, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001.jsonl"]
    assert read(tmp_path) == [SAMPLES[1]]
