"""Test alarms with hand-made rows, and with faults planted in real runs of the quick start's model."""

from __future__ import annotations

import pytest
from small_run import QUICKSTART, small_run
from tables import each_row

from megatron_srpo.config.load import load_config
from megatron_srpo.data.records import Verdict
from megatron_srpo.observe.alarms import Limits, alarms, too_many_unjudged
from megatron_srpo.observe.reporter import TrainingStopped
from megatron_srpo.rollout.transformers.engine import TransformersEngine
from megatron_srpo.tasks.pool import Pool
from megatron_srpo.training.teacher import Teacher

LIMITS = Limits(dead_group_share=0.9, logprob_gap=0.05, ema_rate=0.05, weighs_entropy=True)
HEALTHY = {
    "updates": 1,
    "updates_skipped": 0,
    "pass_rate": 0.5,
    "response_tokens_mean": 100.0,
    "policy_entropy": 0.5,
    "teacher_entropy": 0.3,
    "format_rate": 1.0,
    "zero_advantage_share": 0.3,
    "sdpo_token_share": 0.4,
    "entropy_weight_std": 0.25,
    "engine_logprob_gap": 1e-7,
    "teacher_distance": 0.01,
    "teacher_followed": 0.05,
    "verifier_failed_share": 0.0,
}


def names(rows, limits=LIMITS):
    """Return the alarms' names."""
    return [alarm.name for alarm in alarms(rows, limits)]


def rows(count, **changes):
    """Return `count` healthy rows with `changes`."""
    return [HEALTHY | changes for _ in range(count)]


def test_a_healthy_run_is_quiet():
    assert names([]) == names(rows(1)) == names(rows(50)) == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dead_groups", dict(zero_advantage_share=0.95)),
        ("teacher_still", dict(teacher_followed=0.0)),
        ("teacher_still", dict(teacher_followed=0.004)),  # as an EMA in bf16 does
        ("uniform_weights", dict(entropy_weight_std=0.001)),
    ],
)
def test_a_fault_is_reported_in_its_third_step_and_not_after_its_end(name, fault):
    faulty = rows(5) + rows(2, **fault)
    assert names(faulty) == []
    assert names(faulty + rows(1, **fault)) == [name]
    assert names(faulty + rows(1, **fault) + rows(1)) == []


def test_discarded_samples_are_reported_at_once():
    # Over-sampling discarded long responses silently.
    faulty = rows(2) + rows(1, samples_dropped=3)
    (alarm,) = alarms(faulty, LIMITS)
    assert alarm.name == "samples_dropped" and "3 samples" in alarm.finding
    assert names(faulty + rows(1, samples_dropped=0)) == []


@each_row(
    "fall, expected",
    [
        (dict(response_tokens_mean=20.0, policy_entropy=0.1), ["collapse"]),
        (dict(format_rate=0.5, policy_entropy=0.1), ["collapse"]),
        (dict(format_rate=0.5, policy_entropy=0.1, pass_rate=0.1), ["collapse"]),
        (
            dict(response_tokens_mean=20.0, policy_entropy=0.1, pass_rate=0.8),
            [],
        ),  # shorter, surer and better: learning
        (dict(policy_entropy=0.1), []),
        (dict(response_tokens_mean=70.0, policy_entropy=0.4), []),
    ],
)
def test_collapse_is_several_falls_without_a_gain(fall, expected):
    assert names(rows(10) + rows(3, **fall)) == expected


@each_row(
    "before, now, expected",
    [
        (0.96, 0.99, []),  # nearly the maximum
        (1.0, 1.0, []),
        (0.96, 0.96, ["collapse"]),
        (0.96, 0.5, ["collapse"]),
        (0.5, 0.53, ["collapse"]),
    ],
)
def test_a_policy_that_is_nearly_always_right_may_get_shorter(before, now, expected):
    short = dict(response_tokens_mean=50.0, policy_entropy=0.1)
    assert names(rows(10, pass_rate=before) + rows(3, pass_rate=now, **short)) == expected


def test_an_entropy_that_is_not_finite_has_not_fallen():
    assert names(rows(10) + rows(3, policy_entropy=None, response_tokens_mean=50.0)) == []
    assert names(rows(10, policy_entropy=None) + rows(3, response_tokens_mean=50.0)) == []


def test_gaps_and_non_finite_numbers_are_reported_at_once():
    assert (
        names(rows(1, engine_logprob_gap=0.06)) == names(rows(1, engine_logprob_gap=None)) == ["logprob_gap"]
    )


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_do_not_stop_the_others(value):
    # As in a run (nan, inf), or in metrics.jsonl (null).
    shares = (
        "pass_rate",
        "format_rate",
        "zero_advantage_share",
        "sdpo_token_share",
        "updates",
        "updates_skipped",
        "response_tokens_mean",
        "verifier_failed_share",
    )
    broken = dict.fromkeys(set(HEALTHY) - set(shares), value)
    assert names(rows(9) + rows(4, **broken)) == ["logprob_gap"]
    assert names(rows(9) + rows(4, **broken | {"zero_advantage_share": 1.0})) == [
        "dead_groups",
        "logprob_gap",
    ]


def test_verifier_failures_are_reported_at_once():
    assert names(rows(1, verifier_failed_share=0.05)) == ["verifier_failures"]
    assert names(rows(1, verifier_failed_share=0.04)) == []


@each_row(
    "shares, stops",
    [
        ([1.0], True),
        ([0.0, 0.0, 1.0], True),
        ([0.5, 0.6, 0.5], True),
        ([0.9, 0.9], False),
        ([0.9, 0.4, 0.9], False),
        ([0.04] * 9, False),
        ([None, None, None], False),
        ([], False),
    ],
)
def test_training_stops_without_verdicts(shares, stops):
    found = too_many_unjudged([HEALTHY | {"verifier_failed_share": share} for share in shares])
    assert (found is not None) == stops


def test_what_is_meant_to_be_so_is_no_alarm():
    # A teacher frozen on purpose, replay of another policy's samples, no entropy weighting, and nothing to
    # learn from raise none of these.
    quiet = Limits(dead_group_share=0.9, logprob_gap=None, ema_rate=None, weighs_entropy=False)
    assert names(rows(9, teacher_followed=0.0, engine_logprob_gap=0.7, entropy_weight_std=0.0), quiet) == []
    assert names(rows(9, teacher_distance=0.0, teacher_followed=0.0)) == []  # the policy does not move either
    assert names(rows(9, teacher_followed=0.0, updates_skipped=1)) == []  # no update, nothing to follow
    assert (
        names(rows(9, entropy_weight_std=0.0, teacher_entropy=0.01)) == []
    )  # a certain teacher has equal weights


def test_limits_are_the_configurations():
    def limits(*overrides):
        return Limits.of(load_config(QUICKSTART / "config.yaml", list(overrides)))

    assert limits() == LIMITS
    assert limits("teacher.kind=frozen", "rollout.replay=/x").ema_rate is None
    assert limits("rollout.replay=/x").logprob_gap is None
    assert not limits("algorithm.entropy_beta=0").weighs_entropy
    assert limits("algorithm.name=grpo")[2:] == (None, False)


# ---- faults planted in real runs
# ---------------------------------------------------------------------------------------


def perturb(monkeypatch):
    """Make the engine report other log-probabilities than it sampled with."""
    generate = TransformersEngine.generate

    def wrong(*arguments):
        for completions in generate(*arguments):
            for completion in completions.values():
                completion.logprobs[1::2] = [value - 0.2 for value in completion.logprobs[1::2]]
            yield completions

    monkeypatch.setattr(TransformersEngine, "generate", wrong)


def praise(monkeypatch):
    """Make the verifier accept everything."""
    always = Verdict(reward=1.0, correct=True, format_ok=True)
    monkeypatch.setattr(Pool, "verify", lambda self, jobs: [always for _ in jobs])


def freeze(monkeypatch):
    """Keep the teacher from following the policy."""
    monkeypatch.setattr(Teacher, "follow", lambda self, optimizer, parameters: None)


@pytest.mark.parametrize(
    ("plant", "name"),
    [(None, None), (perturb, "logprob_gap"), (praise, "dead_groups"), (freeze, "teacher_still")],
)
def test_planted_faults_raise_their_alarm_within_five_steps(plant, name, monkeypatch, tmp_path, capsys):
    # Only the right alarm is raised, and reported once, with advice; without a fault there is none.
    if plant:
        plant(monkeypatch)
    raised = [row["alarms"] for row in small_run(tmp_path / "run")]
    assert {alarm for of_step in raised for alarm in of_step} == ({name} if name else set())
    assert capsys.readouterr().out.count(f"alarm {name}:") == (1 if name else 0)
    said = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert (
        "rank 0 of 1 on" in said and "step 5: update" in said and (name is None or f"alarm {name}:" in said)
    )


def test_stop_on_ends_the_run_and_keeps_what_was_learnt(monkeypatch, tmp_path):
    perturb(monkeypatch)
    with pytest.raises(TrainingStopped, match=r"step 1: alarm logprob_gap \(logging.stop_on\)"):
        small_run(tmp_path / "run", "logging.stop_on=[logprob_gap]")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert "TrainingStopped" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()


@each_row("verdict", ["raise KeyError(1)", "return None", "return 1.0", "return float('nan')"])
def test_a_verifier_that_always_fails_stops_the_run(verdict, tmp_path_factory, capsys):
    # Before, every sample was excluded, and the run ended with loss 0 and without an alarm.
    tmp_path = tmp_path_factory.mktemp("failing")
    file = tmp_path / "mine.py"
    example = (QUICKSTART.parent / "own_task" / "backwards.py").read_text()
    lines = example.splitlines()
    place = next(number for number, line in enumerate(lines) if line.strip().startswith("def verify"))
    file.write_text("\n".join([*lines[: place + 1], f"        {verdict}", *lines[place + 1 :]]))
    with pytest.raises(
        TrainingStopped, match="step 1: no sample of the step has a verdict; correct the verifier"
    ):
        small_run(tmp_path / "run", f"task.path={file}", "task.name=mine", "train.steps=2")
    said = capsys.readouterr().out
    assert said.count("the verifier of task mine failed on mine/train/") == 1
    assert "alarm verifier_failures: 100% of the step's samples have no verdict" in said
    if "raise" in verdict:
        assert f"error: KeyError: 1 ({file}:{place + 2})" in said.replace("\n", "")
