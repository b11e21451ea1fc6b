"""Test the examples for clusters.

Their configurations load and fit the hardware that they name; their scripts and manifest are well-formed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.settings import transformer_config
from megatron_srpo.plan.layouts import plan_for
from megatron_srpo.plan.machine import MACHINES, Workload
from megatron_srpo.plan.memory import total_parameters

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHARED = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "num_attention_heads": 32,
}
DENSE = SHARED | {"model_type": "qwen3", "num_hidden_layers": 36, "num_key_value_heads": 8}
EXPERTS = SHARED | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
}
# example → (training GPUs, parameters as published, config.json)
MODELS = {
    "qwen3_4b": (
        8,
        4_022_468_096,
        DENSE | dict(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    ),
    "qwen3_8b": (
        8,
        8_190_735_360,
        DENSE | dict(hidden_size=4096, intermediate_size=12_288, tie_word_embeddings=False),
    ),
    "qwen3_30b_a3b": (
        32,
        30_532_122_624,
        EXPERTS
        | dict(
            hidden_size=2048,
            intermediate_size=6144,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
    ),
}
VARIANTS = {
    "srpo": (["algorithm.name=srpo"], 5e-6, 32),
    "grpo": (["algorithm.name=grpo"], 1e-6, 8),
    "sdpo": (["algorithm.name=sdpo"], 1e-5, 32),
    "advantage mix": (["algorithm.name=advantage_mix"], None, 32),
    "no weighting": (["algorithm.entropy_beta=0"], 5e-6, 32),
}


def load(name: str, tmp_path: Path, *overrides: str) -> Config:
    """Return the example's configuration for a folder that holds config.json alone."""
    model, file = tmp_path / "model", EXAMPLES / name / "config.yaml"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[name][2]))
    return load_config(file, [f"hf_path={model}", *overrides])


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("name", list(MODELS))
def test_example_fits(name, variant, tmp_path):
    # Each algorithm on the GPUs that the README names, with the paper's learning rate and mini-batch, and 10
    # % of memory to spare.
    overrides, lr, mini_batch = VARIANTS[variant]
    config, (gpus, parameters, _) = load(name, tmp_path, *overrides), MODELS[name]
    architecture, machine = HFFolder(config.model.hf_path).architecture, MACHINES["h100"]
    assert config.rollout.engine == "sglang" and total_parameters(architecture) == parameters
    transformer_config(architecture, config.model, config.parallel, config.megatron)
    plan = plan_for(architecture, config, machine, gpus, Workload.expected(config))
    assert plan.problem(machine) is None and plan.bytes < 0.9 * machine.memory
    assert config.mini_batch_prompts == mini_batch and (lr is None or config.lr == lr)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (32, 8)
    evaluation = config.evaluation
    assert (evaluation.every, evaluation.samples, evaluation.temperature, evaluation.top_p) == (
        5,
        16,
        0.6,
        0.95,
    )


def test_scripts_are_bash():
    scripts = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
    errors = {
        script: subprocess.run(["bash", "-n", script], capture_output=True).stderr for script in scripts
    }
    assert scripts and not any(errors.values()), errors


def test_manifest():
    # A PyTorchJob of equal nodes, whose container has the operator's name and whose example exists.
    job = yaml.safe_load((EXAMPLES / "cluster" / "pytorchjob.yaml").read_text())
    nodes = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob" and set(nodes) == {"Master", "Worker"}
    for node in nodes.values():
        (container,) = node["template"]["spec"]["containers"]
        assert container["name"] == "pytorch" and node["restartPolicy"] == "OnFailure"
        example = re.search(r"train (\S+)", container["args"][0])[1]
        assert (ROOT / example).is_file() and (ROOT / "tools" / "torchrun.py").is_file()
        assert '--nnodes "$PET_NNODES"' in container["args"][0]  # the operator's WORLD_SIZE counts processes


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "a\\nb\\nc\\n"; else echo "$@" >>"$LOG"; fi',
    "srun": """printf "%s\\n" "$*" >>"$LOG"; [ "$SRUN_CPUS_PER_TASK" = 64 ] || exit 3
case "$*" in *torchrun.py*) # training: it runs until the servers have received the warning
    until [ "$(grep -c outlives "$LOG")" -ge 2 ] || [ "$SECONDS" -ge 60 ]; do command -p sleep 0.1; done
    exit "$LEFT";;
esac
until [ "$1" = bash ]; do shift; done
exec "$@\"""",
    "sglang": 'kill -USR1 $$; echo "outlives the warning: $4" >>"$LOG"',
    "sleep": "exit 0",
}


@pytest.mark.parametrize("left", [0, 1, 75])
def test_slurm_job(tmp_path, left):
    # Two nodes train, one samples; the job is requeued if and only if the run exits with 75. srun and
    # scontrol are stubs.
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    config = tmp_path / "config.yaml"
    config.write_text("model: {hf_path: models/it's}\ntrain: {steps: 1}\nlogging: {dir: unused}\n")
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "LEFT": str(left),
        "PYTHON": sys.executable,
    }
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_NODELIST": "x",
        "SERVER_NODES": "1",
        "SERVER_GPUS": "4",
    }
    environment |= {"SGLANG_PYTHON": str(tmp_path / "sglang"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "examples/cluster/slurm.sh", config, "train.seed=3"], cwd=ROOT, env=environment, timeout=120
    )
    lines = log.read_text().splitlines()
    assert done.returncode == left and ("requeue 7" in lines) == (left == 75)
    servers = [line for line in lines if "launch_server" in line]
    assert lines.count("outlives the warning: models/it's") == len(servers)
    assert [re.search(r"--nodelist (\S+)", line)[1] for line in servers] == ["c", "c"]
    (training,) = [line for line in lines if "torchrun.py" in line]
    assert "--nodelist a,b" in training and "--nnodes 2" in training and "--rdzv-endpoint a:29500" in training
    assert "rollout.urls=[http://c:30000,http://c:30004]" in training and training.endswith("train.seed=3")


def test_torchrun_returns_the_status():
    # 75, where torchrun itself returns 1; SIGUSR1 does not end it.
    program = "import os, signal, sys; os.kill(os.getppid(), signal.SIGUSR1); sys.exit(75)"
    command = [
        sys.executable,
        "tools/torchrun.py",
        "--standalone",
        "--nproc-per-node",
        "1",
        "--no-python",
        sys.executable,
        "-c",
        program,
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 75


def test_torchrun_gives_the_ranks_their_time():
    # SIGTERM to this process alone: the rank exits when it has saved, and with 75, which torchrun's own
    # shutdown would lose.
    program = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), sys.exit(75)))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)"""
    command = [sys.executable, "tools/torchrun.py", "--standalone", "--nproc-per-node", "1", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 75
