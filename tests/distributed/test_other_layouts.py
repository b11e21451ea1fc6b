"""Compare a run that resumes at another layout after each step with the run of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import Run, launch, run_jobs
from rollouts import write_rollouts
from tiny import make_model, save_folder

from megatron_srpo.checkpoint.weights import RunTensors
from megatron_srpo.model.hf_folder import HFFolder

TP, PP, VPP, EP = (
    f"parallel.{name}_model_parallel_size=" for name in ("tensor", "pipeline", "virtual_pipeline", "expert")
)
CP, SP, NO_DO = (
    "parallel.context_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.use_distributed_optimizer=false",
)
SINGLE = [TP + "1", PP + "1", VPP + "null", EP + "1", "parallel.sequence_parallel=false"]
# model → the layout of each step in turn, on two ranks and then on four
CHAINS = {
    "tied": {2: [[TP + "2"], [NO_DO], [PP + "2", VPP + "2"]], 4: [[TP + "4", SP], [TP + "2", PP + "2"], []]},
    "untied": {2: [[CP], [], [PP + "2"]], 4: [[CP, NO_DO], [TP + "2", NO_DO], [TP + "4"]]},
    "moe": {2: [[EP + "2"], []], 4: [[EP + "2"], [TP + "2", SP, EP + "2"]]},
    "llama": {2: [[TP + "2"], []], 4: [[PP + "2"]]},
}
FAMILY = {"moe": "qwen3_moe", "llama": "llama"}
OVERRIDES = {"llama": ["teacher.kind=trust_region", "teacher.interpolation=0.4"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return {model: (run of one process, chain)}: one launch each of one, two and four ranks."""
    root = tmp_path_factory.mktemp("resume")
    config = root / "config.yaml"
    config.write_text(
        "model: {hf_path: set, dtype: float32}\n"
        "parallel: {distributed_timeout_minutes: 1}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 128,\n"
        "  max_response_tokens: 64}\n"
        "teacher: {max_prompt_tokens: 160}\n"
        "train: {steps: 1, micro_batch_tokens: 4000}\n"
        "optimizer: {lr: 1.0e-3, lr_warmup_steps: 4}\n"
        "evaluation: {every: 0}\n"
        "checkpoint: {save_interval: 1, keep_last: 1}\n"
        "logging: {dir: set}\n"
    )
    common = {}
    for name, chain in CHAINS.items():
        steps = sum(map(len, chain.values()))
        options = (
            {"family": FAMILY[name]} if name in FAMILY else {"tied": name != "untied", "vocab_size": 261}
        )
        model = make_model(**options)
        folder = HFFolder(save_folder(root / f"{name}-hf", model))
        rollouts = write_rollouts(root / f"{name}-rollouts", folder, model, steps=steps)
        common[name] = (
            steps,
            [f"model.hf_path={folder.path}", f"rollout.replay={rollouts}", *OVERRIDES.get(name, [])],
        )
    single = run_jobs(
        1, config, {name: [*given, f"train.steps={steps}"] for name, (steps, given) in common.items()}, root
    )
    for ranks in (2, 4):
        jobs = []
        for name, chain in CHAINS.items():
            for step, layout in enumerate(chain[ranks], 1 if ranks == 2 else len(chain[2]) + 1):
                overrides = [
                    *common[name][1],
                    *layout,
                    f"train.steps={step}",
                    f"logging.dir={root / name}-chain",
                ]
                jobs.append({"command": "train", "config": str(config), "overrides": overrides})
        launch(ranks, "layouts.py", jobs, root / f"chain-{ranks}.json")
    return {name: (run, Run(Path(f"{run.folder}-chain"))) for name, run in single.items()}


@pytest.mark.parametrize("name", list(CHAINS))
def test_layouts_in_turn_train_as_one_process_does(runs, name):
    # Every step's loss and gradient norm to 1e-5, the last weights to 1e-4; the teacher's weights show in the
    # losses that follow.
    single, chain = runs[name]
    assert len(single.rows) == len(chain.rows) == sum(map(len, CHAINS[name].values()))
    for one, other in zip(single.rows, chain.rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-9)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5, abs=1e-9)
        assert other["lr"] == one["lr"] and one["sdpo_token_share"] > 0
    for key, tensor in single.weights.items():
        torch.testing.assert_close(chain.weights[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["moe", "llama"])
def test_the_last_checkpoint_is_the_run_s_model(runs, name):
    # The policy in HF names, put together from four ranks' slices: the bits of the exported folder, and its
    # architecture.
    _, chain = runs[name]
    saved = RunTensors(chain.folder, "policy")
    assert saved.architecture == HFFolder(chain.folder / "hf").architecture
    assert set(saved.names()) == set(chain.weights)
    assert all(torch.equal(saved.tensor(key), tensor) for key, tensor in chain.weights.items())


def test_megatron_loads_a_run_s_checkpoint(runs, tmp_path):
    # `dist_checkpointing.load` fills models of any layout and dtype with the weights of hf/, bit for bit.
    layouts = {"tied": [TP + "2"], "moe": [EP + "2"], "llama": [PP + "2", "model.dtype=bfloat16"]}
    jobs = []
    for name, layout in layouts.items():
        run = runs[name][1].folder
        [checkpoint] = (run / "checkpoints").glob("step_*")
        job = {"config": str(run / "config.yaml"), "save": None, "output": str(tmp_path / name)}
        jobs.append(
            job
            | {"overrides": SINGLE + [f"model.hf_path={run / 'hf'}", *layout], "checkpoint": str(checkpoint)}
        )
    launch(2, "convert_worker.py", jobs, tmp_path / "jobs.json")
    for name in layouts:
        reports = json.loads((tmp_path / name).read_text())
        assert [report["wrong"] for report in reports] == [[], []]
        assert all(report["compared"] > 10 and report["unexpected"] == [] for report in reports)
