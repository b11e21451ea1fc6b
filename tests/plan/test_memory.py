"""Compare the planner's memory with what is built.

Parameters and states to the element, activations with what autograd keeps, and complete processes with the
kernel's own count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packed import row_of
from simulated import simulated
from tables import each_row
from tiny import FAMILIES, make_model, save_folder

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config, ParallelSection
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.model.build import build_chunks
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.plan.machine import MACHINES, Workload
from megatron_srpo.plan.memory import (
    Batch,
    activation_bytes,
    layer_bytes,
    memory,
    stage_parameters,
    state_bytes,
)
from megatron_srpo.plan.step import traffic
from megatron_srpo.training.trainer import Trainer, TrainerSettings

ROOT = Path(__file__).parents[2]
CPU = MACHINES["cpu"]
TP, PP, VPP, EP, ETP = (
    f"parallel.{name}_parallel_size="
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model", "expert_tensor")
)
SP = "parallel.sequence_parallel=true"
MODELS = {family: dict(family=family, tied=False) for family in FAMILIES} | {"tied": dict(tied=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return model → its folder, of four layers and 261 rows, so that the vocabulary is padded."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_folder(root / name, make_model(vocab_size=261, **options))
        for name, options in MODELS.items()
    }


def configure(folder: Path, *overrides: str) -> Config:
    """Return a configuration for `folder`."""
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(
        f"model: {{hf_path: {folder}, dtype: float32}}\ntrain: {{steps: 3}}\nlogging: {{dir: unused}}\n"
    )
    return load_config(file, list(overrides))


@each_row(
    "model, ranks, layout",
    [
        *((model, 4, [TP + "2", SP, PP + "2", VPP + "2"]) for model in MODELS),
        ("tied", 1, []),
        ("tied", 2, [PP + "2"]),
        ("qwen2", 4, [TP + "4"]),
        ("qwen3_moe", 2, [EP + "2"]),
        ("qwen3_moe", 4, [PP + "2", EP + "2"]),
        ("qwen3_moe", 4, [TP + "2", SP, EP + "4", ETP + "1"]),
        ("qwen3_moe", 4, [TP + "2", SP, EP + "2"]),
    ],
)
def test_parameters_of_every_rank(folders, model, ranks, layout):
    # Equal to those of the chunks that each rank builds, dense ones and experts apart.
    config = configure(folders[model], *layout)
    architecture, stages = HFFolder(folders[model]).architecture, config.parallel.pipeline_model_parallel_size
    for rank in range(ranks):
        with simulated(rank, ranks, config.parallel) as layout_of_rank:
            built = [
                p
                for chunk in build_chunks(
                    architecture, config.model, config.parallel, config.megatron, layout_of_rank.device
                )
                for p in chunk.parameters()
            ]
        experts = sum(p.numel() for p in built if not getattr(p, "allreduce", True))
        expected = stage_parameters(architecture, config, rank * stages // ranks)
        assert sum(p.numel() for p in built) == expected.total
        if (
            config.parallel.expert_model_parallel_size > 1
        ):  # Megatron's mark; otherwise experts are replicated like all else
            assert experts == expected.experts


def test_uneven_stages_are_refused(folders):
    config = configure(folders["tied"], PP + "2", "megatron.num_layers_in_first_pipeline_stage=1")
    with pytest.raises(ConfigError, match="num_layers_in_first_pipeline_stage"):
        stage_parameters(HFFolder(folders["tied"]).architecture, config, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_states_of_a_rank_of_four(folders, dtype, distributed, context):
    # Weights, gradient buffers, Adam's states with fp32 masters, the teacher's copy and share; buffers end in
    # padding.
    layout = [
        f"parallel.use_distributed_optimizer={distributed}",
        f"parallel.context_parallel_size={context}",
    ]
    config = configure(folders["qwen3"], f"model.dtype={dtype}", *layout)
    folder = HFFolder(folders["qwen3"])
    with simulated(1, 4, config.parallel) as layout:
        trainer = Trainer(TrainerSettings.of(config), folder, layout)
        size, buffer = trainer.parameters[0].element_size(), trainer.chunks[0].buffers[0]
        for parameter in trainer.parameters:
            parameter.main_grad.fill_(1e-3)
        trainer.optimizer.step(0.0)
        trainer.teacher.follow(trainer.optimizer, trainer.parameters)
        held = [trainer.optimizer.held_range(p) for p in trainer.parameters]
        own = sum(end - start for start, end in held)
        inner = [one.optimizer for one in trainer.optimizer.inner.chained_optimizers]
        states = [state for one in inner for state in one.state.values()]
        moments = sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)
        optimized = [p for one in inner for group in one.param_groups for p in group["params"]]
        weights = {p.untyped_storage().data_ptr() for p in trainer.parameters}
        masters = sum(p.nbytes for p in optimized if p.untyped_storage().data_ptr() not in weights)
        assert moments == own * 8 and (masters > 0) == (dtype == "bfloat16")
        found = {
            "weights": sum(p.nbytes for p in trainer.parameters),
            "gradients": buffer.grad_data.nbytes,
            "optimizer": moments + masters,
            "teacher": sum(p.nbytes for p in trainer.teacher.parameters),
            "EMA": sum(share.nbytes for share in trainer.teacher.shares),
        }
        assert size == {"float32": 4, "bfloat16": 2}[dtype]
    expected = state_bytes(folder.architecture, config, CPU, 4, stage=0)
    embedded = expected.pop("embedded engine")
    copies = {"float32": 2, "bfloat16": 1}[dtype]
    parameters = sum(p.numel() for p in make_model(vocab_size=261, tied=False).parameters())
    assert embedded == copies * size * parameters
    assert expected == pytest.approx(found, rel=0.02)
    assert expected["weights"] == found["weights"]


@pytest.mark.parametrize(("model", "context"), [("tied", 1), ("tied", 2), ("qwen3_moe", 1)])
def test_activations_of_a_layer(folders, model, context):
    # What autograd keeps of one more layer, storage by storage. Local layers in fp32: dense to the byte,
    # experts to 2 %.
    config = configure(folders[model], f"parallel.context_parallel_size={context}")
    lengths, kept = [64, 4, 1, 16], []  # so different that attention does not pad them
    for layers in (2, 3):
        with simulated(0, context, config.parallel) as layout:
            architecture = HFFolder(
                save_folder(
                    folders[model].parent / f"{model}-{layers}", make_model(layers=layers, **MODELS[model])
                )
            )
            (chunk,) = build_chunks(
                architecture.architecture, config.model, config.parallel, config.megatron, layout.device
            )
            documents = [[5] + [6] * length for length in lengths]
            row = row_of(documents, sum(lengths), ContextParallel(0, context))
            weights, storages, alive = {p.untyped_storage().data_ptr() for p in chunk.parameters()}, {}, []

            def note(tensor, weights=weights, storages=storages, alive=alive):
                alive.append(tensor)
                if (place := tensor.untyped_storage().data_ptr()) not in weights:
                    storages[place] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                packed = chunk.packed_row(row.documents, row.positions)
                batches = packed.batches
                output = chunk(row.ids[None], row.positions[None], None, packed_seq_params=packed)
            kept.append(sum(storages.values()))
            del output
    batch = Batch(tokens=sum(lengths) // context, responses=0, distilled=0)
    planned, _ = layer_bytes(HFFolder(folders[model]).architecture, config, CPU, batch)
    tolerance = 0.02 if model == "qwen3_moe" else 0
    if context > 1:  # a CPU copies and pads the chunks of documents: to 5 %
        a = architecture.architecture
        copied = sum(batch.keys.count * batch.keys.length for batch in batches) - sum(lengths)
        planned += copied * 8 * a.head_dim * a.num_key_value_heads
        tolerance = 0.05
    assert planned == pytest.approx(kept[1] - kept[0], rel=tolerance)


def test_recompute_keeps_layer_inputs(folders):
    # A layer's input instead of the layer, and one complete layer.
    architecture, batch = HFFolder(folders["tied"]).architecture, Batch(1000, 10, 0)
    recompute = [
        f"megatron.recompute_{key}" for key in ("granularity=full", "method=uniform", "num_layers=1")
    ]
    config = configure(folders["tied"])
    full = memory(architecture, config, CPU, 1, batch)["activations"]
    less = memory(architecture, configure(folders["tied"], *recompute), CPU, 1, batch)["activations"]
    layer, _ = layer_bytes(architecture, config, CPU, batch)
    assert full - less == pytest.approx(3 * layer - 4 * 1000 * 64 * 4)


@pytest.mark.parametrize("virtual", [2, 4])
def test_layers_in_flight_are_megatrons_warm_up_and_one(folders, virtual):
    # Stage by stage, against the schedule that runs.
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,  # after the package, which makes it importable
    )

    architecture = dataclasses.replace(HFFolder(folders["qwen3"]).architecture, num_hidden_layers=16)
    config, batch = configure(folders["qwen3"], f"{PP}4", f"{VPP}{virtual}"), Batch(1000, 10, 0)
    layer, _ = layer_bytes(architecture, config, CPU, batch)
    for stage in range(4):
        group = SimpleNamespace(size=lambda: 4, rank=lambda stage=stage: stage)
        pipeline = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warm_up, _ = get_pp_rank_microbatches(64, virtual, 4, p2p_communicator=pipeline)
        kept, _ = activation_bytes(architecture, config, CPU, batch, stage)
        assert kept == pytest.approx((warm_up + 1) * 4 / virtual * layer)


def measured(*arguments: str) -> dict[str, dict]:
    """Return rows of tools/bench/bench_step.py by algorithm."""
    command = [
        sys.executable,
        "tools/bench/bench_step.py",
        "--shape",
        "tiny",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert set(report) == {"device", "date", "shape", "rows"}
    return {row["name"]: row for row in report["rows"]}


def planned(width: int, algorithm: str, row: dict, tmp_path: Path) -> float:
    """Return the planner's bytes for a row of `measured`, without its engine."""
    shape = dict(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape |= {
        "model_type": "qwen3",
        "vocab_size": 512,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = configure(tmp_path, f"algorithm.name={algorithm}")
    parts = memory(HFFolder(tmp_path).architecture, config, CPU, 1, Batch(*row["batch"]))
    return sum(size for name, size in parts.items() if name != "embedded engine")


def test_peak_memory_of_complete_steps(tmp_path):
    # The trainer's peak by VmHWM at two sizes, with and without a teacher; in differences the interpreter's
    # share cancels. From the narrow to the wide model most of the increase is states; from GRPO to SRPO it is
    # the teacher.
    lengths = ["--prompts", "4", "--samples", "2", "--prompt-tokens", "32", "--response-tokens", "64"]
    found = {
        width: measured(*lengths, "--algorithms", "grpo", "srpo", "--width", str(width))
        for width in (128, 512)
    }
    expected = {
        (width, name): planned(width, name, row, tmp_path)
        for width, rows in found.items()
        for name, row in rows.items()
    }
    peak = {(width, name): row["extra_bytes"] for width, rows in found.items() for name, row in rows.items()}
    for name in ("grpo", "srpo"):
        assert expected[512, name] - expected[128, name] == pytest.approx(
            peak[512, name] - peak[128, name], rel=0.1
        )
    assert expected[512, "srpo"] - expected[512, "grpo"] == pytest.approx(
        peak[512, "srpo"] - peak[512, "grpo"], rel=0.1
    )
    for row in found[512].values():
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["mfu"] is None
        assert set(row) >= {"ratio", "seconds_pack", "seconds_teacher", "seconds_update"}


def test_offloaded_states_count_where_activations_are_gone(folders):
    # The peak is the larger of the two, and the states cross the bus twice an update.
    architecture = HFFolder(folders["tied"]).architecture
    batches = {"small": Batch(10, 10, 0), "large": Batch(100_000, 10, 0)}
    config, offload = (configure(folders["tied"], *o) for o in ([], ["optimizer.optimizer_cpu_offload=true"]))
    states = state_bytes(architecture, config, CPU, 1, stage=0)
    visitors = states["optimizer"] + states["EMA"]
    for size, batch in batches.items():
        before, after = (memory(architecture, c, CPU, 1, batch) for c in (config, offload))
        there = before["activations"] + before["loss tiles"]
        assert sum(before.values()) - sum(after.values()) == pytest.approx(min(visitors, there)), size
    sent = traffic(architecture, offload, CPU, 1, Workload(10, 50, 0.5))["host"].bytes
    assert sent == 2 * visitors and "host" not in traffic(architecture, config, CPU, 1, Workload(10, 50, 0.5))


def test_worst_batch(folders):
    # The budget, or the longest sequence where that is longer; a rank's share of the distilled tokens.
    config = configure(
        folders["tied"],
        "rollout.max_response_tokens=100",
        "rollout.max_prompt_tokens=28",
        "train.micro_batch_tokens=64",
    )
    assert Batch.worst(config, 4, Workload(10, 50, 0.5)) == Batch(128, 128, 64 * 50 * 0.5)
    shared = config.model_copy(update={"parallel": ParallelSection(context_parallel_size=2)})
    assert Batch.worst(shared, 4, Workload(10, 50, 0.5)) == Batch(
        64, 64, 64 * 50 * 0.5
    )  # half of twice as many samples
