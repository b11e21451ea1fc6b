"""Test the retention of a run's dumps: a thinned run trains and resumes as one that keeps every step."""

from __future__ import annotations

from small_run import small_run

SMALL = ("rollout.prompts_per_step=2", "rollout.max_response_tokens=8", "checkpoint.save_interval=13")
TINY = "logging.rollouts_limit_gib=1e-6"
COSTS = ("seconds", "alarms")


def dumps(run):
    return sorted(int(file.name[5:11]) for file in (run / "rollouts").glob("step_??????.jsonl"))


def learnt(rows):
    return [{key: value for key, value in row.items() if not key.startswith(COSTS)} for row in rows]


def test_a_thinned_run_is_resumed_exactly(tmp_path, capsys):
    everything = small_run(tmp_path / "all", *SMALL, "train.steps=14")
    out = capsys.readouterr().out
    assert "rollouts/ keeps every step up to 100 GiB (logging.rollouts_limit_gib)" in out
    small_run(tmp_path / "few", *SMALL, "train.steps=13", TINY)
    out = capsys.readouterr().out
    assert "step 13: rollouts/ exceeds logging.rollouts_limit_gib; removed steps: 3" in out
    assert dumps(tmp_path / "few") == [1, *range(4, 14)]
    resumed = small_run(tmp_path / "few", *SMALL, "train.steps=14", TINY)
    assert learnt(resumed) == learnt(everything)
    assert dumps(tmp_path / "few") == [1, *range(5, 15)] and dumps(tmp_path / "all") == [*range(1, 15)]
    for step in (1, 14):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
