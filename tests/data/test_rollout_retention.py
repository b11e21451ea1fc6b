"""Test which dumped steps are removed when their folder exceeds its limit."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron_srpo.data.rollout_retention import NEWEST, Retention, kept_steps

SIZE = 1000  # bytes of a step: 700 of samples, 300 of arrays


def write(folder, step, with_tokens=False):
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:06d}.jsonl").write_bytes(b"x" * 700)
    (folder / f"step_{step:06d}.bin").write_bytes(b"x" * (200 if with_tokens else 300))
    if with_tokens:
        (folder / f"step_{step:06d}.tokens.jsonl").write_bytes(b"x" * 100)


def steps_in(folder):
    found = (re.fullmatch(r"step_(\d{6})\..*l", file.name) for file in folder.iterdir() if file.is_file())
    return sorted({int(match[1]) for match in found if match})


def run(folder, limit, steps):
    """Write steps as a run does; return what each left behind."""
    retention, history = Retention(folder, limit), []
    for step in steps:
        write(folder, step, with_tokens=step % 10 == 0)
        retention.added(step)
        history.append(steps_in(folder))
    return history


def test_nothing_is_removed_up_to_the_limit(tmp_path):
    assert run(tmp_path / "a", 50 * SIZE, range(1, 51))[-1] == [*range(1, 51)]
    assert run(tmp_path / "b", None, range(1, 201))[-1] == [*range(1, 201)]


def test_what_is_removed_first(tmp_path):
    # Of 51 steps, 37 (three quarters of the limit) are left: the 14 oldest odd ones go, but not step 1.
    left = run(tmp_path, 50 * SIZE, range(1, 52))[-1]
    assert set(range(1, 52)) - set(left) == {*range(3, 30, 2)}


@pytest.mark.parametrize("limit", [15, 40, 100])
def test_a_long_run_stays_below_its_limit_and_keeps_what_is_stated(tmp_path, limit):
    last = 600
    history = run(tmp_path, limit * SIZE, range(1, last + 1))
    assert max(map(len, history)) <= limit
    for step, left in enumerate(history, 1):
        assert {1, *range(max(1, step - NEWEST + 1), step + 1)} <= set(left)
        assert len(left) >= min(step, int(0.75 * limit) - 1)  # no more than necessary is removed
    # Every 2nd, 4th, … step is left: the older, the fewer.
    old = [step for step in history[-1] if 1 < step <= last - NEWEST]
    gaps = [later - earlier for earlier, later in itertools.pairwise(old)]
    assert gaps == sorted(gaps, reverse=True)
    for step, gap in zip(old, gaps, strict=False):
        assert step % 2 ** (gap.bit_length() - 1) == 0


def test_kept_steps():
    assert kept_steps(range(1, 41), 4) == {1, 4, 8, 12, 16, 20, 24, 28, *range(31, 41)}


def test_a_limit_below_what_is_kept_removes_all_else(tmp_path):
    left = run(tmp_path, 3 * SIZE, range(1, 101))[-1]
    assert left == [1, *range(91, 101)]


def test_other_files_stay(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for name in ("notes.txt", "step_1.jsonl", "step_000002.jsonl.bak", ".step_000003.jsonl.partial"):
        (folder / name).write_bytes(b"x" * 50 * SIZE)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder / "step_000004.jsonl").symlink_to(outside)
    (folder / "step_000006.jsonl").mkdir()
    before = {file.name for file in folder.iterdir()}
    retention = Retention(folder, 12 * SIZE)
    for step in range(100, 200):
        write(folder, step)
        retention.added(step)
    assert before <= {file.name for file in folder.iterdir()} and outside.read_text() == "mine"
    assert len(steps_in(folder)) < 30


def test_an_interrupted_removal_is_completed(tmp_path, monkeypatch):
    run(tmp_path, None, range(1, 41))
    retention, unlink, left = Retention(tmp_path, 30 * SIZE), type(tmp_path).unlink, [5]

    def kill(path, *arguments, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        unlink(path, *arguments, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", kill)
    with pytest.raises(KeyboardInterrupt):
        retention.added(40)
    monkeypatch.undo()
    complete = {file.name[5:11] for file in tmp_path.glob("step_*.jsonl")}
    assert {file.name[5:11] for file in tmp_path.glob("step_*.bin")} != complete
    write(tmp_path, 41)
    removed = Retention(tmp_path, 30 * SIZE).added(41)
    complete = {file.name[5:11] for file in tmp_path.glob("step_*.jsonl") if "tokens" not in file.name}
    assert {file.name[5:11] for file in tmp_path.iterdir()} == complete and 3 not in steps_in(tmp_path)
    assert not set(removed) & set(steps_in(tmp_path))


def test_the_line_at_the_start_states_limit_and_rule(tmp_path):
    line = Retention(tmp_path, 100 * 2**30).describe()
    assert "every step up to 100 GiB (logging.rollouts_limit_gib)" in line
    assert f"step 1, the newest {NEWEST} and every 2nd step" in line
    assert "null" in Retention(tmp_path, None).describe()
