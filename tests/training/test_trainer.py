"""Test the trainer in one process: non-finite updates, bf16, teacher kinds, offloaded state."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints import save, state_of
from rollouts import write_rollouts
from small_run import trainers
from tiny import make_model, save_folder

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.checkpoint.state import restore_trainer, scalars
from megatron_srpo.config.load import load_config
from megatron_srpo.data.records import Route
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.replay import replay
from megatron_srpo.weights.torch_dist import Folder


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function of (*overrides) that returns (trainer, routed groups of one step)."""
    model = make_model()
    folder = HFFolder(save_folder(tmp_path / "hf", model))
    rollouts = write_rollouts(tmp_path / "rollouts", folder, model, steps=1)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{hf_path: {folder.path}, dtype: float32}}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4}\n"
        "teacher: {max_prompt_tokens: 160}\n"
        "train: {steps: 3, micro_batch_tokens: 400}\n"
        "optimizer: {lr: 1.0e-3, lr_warmup_steps: 0}\n"
        "logging: {dir: unused}\n"
    )

    def routed(trainer):
        groups = route_groups(
            replay(rollouts, 1, 4, folder), trainer.algorithm, folder.encode, 160, seed="1/1"
        )
        return trainer, groups

    with trainers() as make:
        yield lambda *overrides: routed(make(load_config(config, list(overrides))))


def step(trainer, groups):
    """Train one step and return its report."""
    with trainer.onloaded():
        batches = trainer.pack(groups)
        return trainer.update(batches, trainer.score_teacher(batches))


def snapshot(parameters):
    """Return a copy of the parameters' values."""
    return [parameter.detach().clone() for parameter in parameters]


def teacher_parameters(trainer):
    """Return the weights that the teacher scores with."""
    return [parameter for chunk in trainer.teacher.chunks for parameter in chunk.parameters()]


def poisoned(groups):
    """Return the same groups, one sample with an infinite advantage: the loss is not finite."""
    bad = Route(branch="grpo", policy_weight=1.0, distillation_weight=0.0, advantage=math.inf)
    (first, *rest), *others = groups
    return [(first.model_copy(update={"route": bad}), *rest), *others]


@pytest.mark.parametrize("optimizer", ["true", "false"])
def test_a_non_finite_update_is_skipped_and_leaves_weights_and_teacher_alone(make_trainer, optimizer):
    trainer, groups = make_trainer(f"parallel.use_distributed_optimizer={optimizer}")
    step(trainer, groups)
    policy, teacher = snapshot(trainer.parameters), snapshot(teacher_parameters(trainer))
    report = step(trainer, poisoned(groups))
    assert report.applied == [False] and report.skipped_in_a_row(2) == 3
    assert all(map(torch.equal, policy, trainer.parameters))
    assert all(map(torch.equal, teacher, teacher_parameters(trainer)))
    report = step(trainer, groups)  # training continues
    assert report.applied == [True] and report.skipped_in_a_row(3) == 0
    assert not all(map(torch.equal, policy, trainer.parameters))
    assert all(torch.isfinite(parameter).all() for parameter in trainer.parameters)


def flat(groups):
    """Return the same groups without a gradient: advantages 0, nothing distilled."""
    route = Route(branch="grpo", policy_weight=1.0, distillation_weight=0.0, advantage=0.0)
    return [tuple(sample.model_copy(update={"route": route}) for sample in group) for group in groups]


def test_a_batch_without_a_gradient_is_not_computed_but_makes_the_same_update(make_trainer, monkeypatch):
    # Adam's momentum, weight decay, schedule and EMA move the weights, bit for bit as if all were computed.
    results = []
    for computes_all in (False, True):
        trainer, groups = make_trainer("optimizer.weight_decay=0.1")
        step(trainer, groups)
        start = snapshot(trainer.parameters)
        with monkeypatch.context() as patch:
            if computes_all:
                patch.setattr(Route, "teaches", True)
            (batch,) = trainer.pack(flat(groups))
            assert (len(batch.micro_batches) > 0) == computes_all
            report = step(trainer, flat(groups))
        assert report.applied == [True] and report.grad_norms == [0.0]
        assert not all(map(torch.equal, start, trainer.parameters))
        results.append((snapshot(trainer.parameters), snapshot(teacher_parameters(trainer)), report))
    (policy, teacher, report), (all_policy, all_teacher, all_report) = results
    assert all(map(torch.equal, policy, all_policy)) and all(map(torch.equal, teacher, all_teacher))
    # One of eight samples is scored: its log-probabilities are compared with the engine's.
    samples = [sample for group in groups for sample in group]
    assert report.sums.trained == 0 and all_report.sums.trained == sum(s.policy_tokens for s in samples)
    assert report.sums.tokens == sum(sample.policy_tokens for sample in samples[::8])
    assert 0 < report.gap_max <= all_report.gap_max


def test_ema_teacher_follows_by_its_rate(make_trainer):
    # After a step it is 5 % of the way from the initial weights to the policy.
    trainer, groups = make_trainer("teacher.kind=ema")
    start = snapshot(trainer.parameters)
    step(trainer, groups)
    for slow, fast, first in zip(teacher_parameters(trainer), trainer.parameters, start, strict=True):
        torch.testing.assert_close(slow, 0.95 * first + 0.05 * fast, atol=1e-7, rtol=1e-6)
        assert not torch.equal(fast, first)


def test_frozen_teacher_stays(make_trainer):
    trainer, groups = make_trainer("teacher.kind=frozen")
    start = snapshot(trainer.parameters)
    step(trainer, groups)
    assert all(map(torch.equal, start, teacher_parameters(trainer)))


def test_live_teacher_is_the_policy(make_trainer):
    trainer, groups = make_trainer("teacher.kind=live", "algorithm.mini_batch_prompts=2")
    assert teacher_parameters(trainer) == []  # no copy
    scores = trainer.score_teacher(trainer.pack(groups))
    (before,) = (weight.clone() for weight in scores[0].weights)
    assert torch.equal(before, trainer.chunks[-1].module.output_weight)
    step(trainer, groups)
    assert torch.equal(scores[0].weights[0], before)  # those that made the hidden states of all mini-batches


def test_trust_region_teacher_is_between_the_initial_model_and_the_policy(make_trainer):
    # Before the first update both are the same; the initial model stays; entropies are those of the
    # interpolated logits.
    trainer, groups = make_trainer("teacher.kind=trust_region", "teacher.interpolation=0.3")
    start = snapshot(trainer.parameters)
    step(trainer, groups)
    assert all(map(torch.equal, start, teacher_parameters(trainer)))
    (scores,) = trainer.score_teacher(trainer.pack(groups))
    initial, policy = scores.weights
    assert torch.equal(policy, trainer.chunks[-1].module.output_weight) and not torch.equal(initial, policy)
    for key, (of_initial, of_policy) in scores.hidden.items():
        logits = (
            0.7 * of_initial.double() @ initial.double().t() + 0.3 * of_policy.double() @ policy.double().t()
        )
        logq = logits[:, : trainer.folder.architecture.vocab_size].log_softmax(1)
        torch.testing.assert_close(
            scores.entropy[key].double(), -(logq.exp() * logq).sum(1), rtol=1e-5, atol=1e-5
        )


def test_output_weight_gradient_goes_straight_to_main_grad(make_trainer):
    # No .grad is left behind. (test_invariance covers the embedding's part of the tied matrix.)
    trainer, groups = make_trainer()
    weight = trainer.chunks[-1].module.output_weight
    trainer.optimizer.zero_grad()
    assert weight.main_grad.abs().max() == 0 and weight.main_grad.dtype == torch.float32
    step(trainer, groups)
    assert weight.grad is None and weight.main_grad.abs().max() > 0


@pytest.mark.parametrize("optimizer", ["true", "false"])
def test_bf16_has_fp32_main_gradients_and_stays_near_fp32(make_trainer, optimizer):
    exact, groups = make_trainer()
    expected = step(exact, groups)
    trainer, groups = make_trainer("model.dtype=bfloat16", f"parallel.use_distributed_optimizer={optimizer}")
    report = step(trainer, groups)
    assert all(
        parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32
        for parameter in trainer.parameters
    )
    assert report.losses[0] == pytest.approx(expected.losses[0], rel=0.05)
    assert report.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=0.05)
    assert report.applied == [True]


def sizes(tensors):
    """Return the bytes of the memory behind each tensor."""
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def state_of_updates(trainer):
    """Return the state that only updates need, by name."""
    return {"masters and moments": list(trainer.optimizer.state()), "EMA": trainer.teacher.shares}


@pytest.mark.parametrize("optimizer", ["true", "false"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_state_is_on_the_device_for_updates_only_and_changes_no_bit(
    make_trainer, monkeypatch, dtype, optimizer
):
    overrides = [
        f"model.dtype={dtype}",
        f"parallel.use_distributed_optimizer={optimizer}",
        "algorithm.mini_batch_prompts=2",
    ]

    def run(*more):
        trainer, groups = make_trainer(*overrides, *more)
        reports = [step(trainer, groups) for _ in range(3)]
        return (
            trainer,
            groups,
            [(r.losses, r.grad_norms, r.teacher_distances) for r in reports],
            state_of(trainer),
        )

    _, _, reports, saved = run()
    trainer, groups, found, offloaded = run("optimizer.optimizer_cpu_offload=true")
    assert found == reports
    assert saved.keys() == offloaded.keys() and all(torch.equal(saved[key], offloaded[key]) for key in saved)
    states = state_of_updates(trainer)
    assert all(tensors and set(sizes(tensors)) == {0} for tensors in states.values())
    moments, masters = 2 * len(trainer.parameters), len(trainer.parameters) * (dtype == "bfloat16")
    assert len(states["masters and moments"]) == moments + masters

    during, forward = (
        [],
        trainer.optimizer.zero_grad,
    )  # before each forward-backward pass, and inside each update
    monkeypatch.setattr(
        trainer.optimizer,
        "zero_grad",
        lambda: (during.append(sum(sizes(trainer.optimizer.state()))), forward()),
    )
    update = trainer.optimizer.inner.step
    monkeypatch.setattr(
        trainer.optimizer.inner,
        "step",
        lambda: (during.append(sum(sizes(trainer.optimizer.state()))), update()),
    )
    step(trainer, groups)
    assert len(during) == 4 and during[0] == during[2] == 0 < during[1] == during[3]


@pytest.mark.parametrize("where", ["optimizer.optimizer_cpu_offload=true", "rollout.colocated=true"])
def test_a_checkpoint_is_restored_into_what_is_offloaded(make_trainer, tmp_path, where):
    # A trainer that offloads its state has the saved numbers of one that does not, bit for bit.
    trainer, groups = make_trainer("model.dtype=bfloat16")
    step(trainer, groups)
    saved, state = state_of(trainer), scalars(trainer)
    save(tmp_path, trainer)
    trainer, groups = make_trainer(
        "model.dtype=bfloat16", "rollout.engine=sglang", "rollout.servers=1", where
    )
    step(trainer, groups)  # from the start model: other numbers
    assert set(sizes(trainer.optimizer.state())) == {0}
    restore_trainer(trainer, Folder(tmp_path), state)
    assert set(sizes(trainer.optimizer.state())) == {0}
    found = state_of(trainer)
    assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)


def test_servers_on_the_same_device_have_all_memory_but_the_policys(make_trainer):
    # rollout.colocated: between steps nothing else is left, and the next step is the same bit for bit.
    colocated = ("rollout.engine=sglang", "rollout.servers=1", "rollout.colocated=true")

    def run(*more):
        trainer, groups = make_trainer("model.dtype=bfloat16", *more)
        reports, left = [], []
        for _ in range(2):
            reports.append(step(trainer, groups).losses)
            left.append(
                sum(
                    sizes(
                        [*trainer.optimizer.state(), *trainer.optimizer.gradients(), *trainer.teacher.shares]
                    )
                )
            )
            left[-1] += sum(sizes(teacher_parameters(trainer)))
        return reports, left, state_of(trainer), dict(trainer.export())

    reports, left, saved, policy = run()
    found, empty, offloaded, same = run(*colocated)
    assert found == reports and empty == [0, 0] and min(left) > 0
    assert all(torch.equal(saved[key], offloaded[key]) for key in saved)
    assert all(torch.equal(policy[key], same[key]) for key in policy)


def test_gradients_are_reduced_during_the_backward_pass(make_trainer, monkeypatch):
    # overlap_grad_reduce: from the second batch on, every bucket's reduction has begun when the backward pass
    # ends.
    overlap = [f"parallel.overlap_{what}=true" for what in ("grad_reduce", "param_gather")]
    trainer, groups = make_trainer(*overlap, "parallel.ddp_bucket_size=2000")
    (chunk,), begun = trainer.chunks, []
    finish = chunk.finish_grad_sync

    def note(**options):
        begun.extend(group.grad_reduce_handle for group in chunk.bucket_groups)
        finish(**options)

    step(trainer, groups)
    monkeypatch.setattr(chunk, "finish_grad_sync", note)
    step(trainer, groups)
    assert len(begun) == len(chunk.bucket_groups) > 3 and None not in begun
