"""One training step by phase, without sampling: GRPO, SDPO and SRPO on the same batch and random weights of a
shape.

    python tools/bench/bench_step.py --shape 1.7b --prompts 32 --samples 8 --response-tokens 1000 [--routed-share
    0.25] [--json]

Every row is a process of its own. Its `seconds` are the best of `--repeats` steps after two others:
`seconds_pack`, `seconds_teacher`, `seconds_update`. `ratio` is to the first row; `tokens_per_second` counts
all tokens trained on; `mfu` is of the FLOP that `plan.step.step_flops` counts, on the stated peak;
`extra_bytes` is the peak above a process that has its imports, `batch` the fullest micro-batch as
`plan.memory.Batch`. All make one optimizer step. Whatever stands before the options overrides the
configuration: section.key=value.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import gc
import json
import multiprocessing
import platform
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_srpo.__main__ import quieten_libraries
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict

SHARED = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
}
SHARED |= {"max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": True}
SHAPES = {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    | {"vocab_size": 512},
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
ALGORITHMS = ("grpo", "sdpo", "srpo")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is measured.

    Lengths are means: responses spread evenly from a half to one and a half of theirs.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    routed_share: float


def make_config(folder: Path, model: dict, algorithm: str, shape: Shape, overrides: list[str]) -> Config:
    """The run's configuration, and the model's config.json: its weights stay random."""
    (folder / "config.json").write_text(json.dumps(SHARED | model))
    file = folder / "config.yaml"
    file.write_text(
        f"model: {{hf_path: {folder}}}\n"
        f"rollout: {{prompts_per_step: {shape.prompts}, samples_per_prompt: {shape.samples}}}\n"
        f"algorithm: {{name: {algorithm}, mini_batch_prompts: null}}\n"
        "train: {steps: 100}\n"
        f"logging: {{dir: {folder / 'run'}}}\n"
    )
    return load_config(file, overrides)


def make_groups(shape: Shape, algorithm: str, vocab_size: int) -> list[Group]:
    """Random tokens, the same for every algorithm; who is distilled: SRPO's `routed_share`, all of SDPO's,
    none of GRPO's.
    """
    rng, groups = random.Random(0), []
    share = {"grpo": 0.0, "sdpo": 1.0}.get(algorithm, shape.routed_share)
    draw = lambda length: tuple(rng.choices(range(vocab_size), k=length))  # noqa: E731
    for number in range(shape.prompts):
        prompt = Prompt(id=str(number), task="random", messages=(), answer="", ids=draw(shape.prompt_tokens))
        group = []
        for index in range(shape.samples):
            half = shape.response_tokens // 2
            response = draw(max(1, rng.randint(half, shape.response_tokens + half)))
            teacher_ids = prompt.ids + draw(shape.response_tokens + 40)
            is_distilled = number * shape.samples + index < share * shape.prompts * shape.samples
            route = Route(
                branch="sdpo" if is_distilled else "grpo",
                policy_weight=float(not is_distilled),
                distillation_weight=float(is_distilled),
                advantage=0.5,
                teacher_ids=teacher_ids if is_distilled else None,
            )
            group.append(
                Sample(
                    prompt=prompt,
                    index=index,
                    segments=(
                        Segment(
                            ids=response,
                            logprobs=(-6.0,) * len(response),
                            versions=(("0", 0, len(response)),),
                        ),
                    ),
                    finish_reason="stop",
                    verdict=Verdict(reward=1.0, correct=True, format_ok=True),
                    route=route,
                )
            )
        groups.append(tuple(group))
    return groups


def give_back_above(size: int) -> None:
    """Of what is freed on a CPU, tensors of `size` bytes and more go back to the system at once, not into
    the holes of a heap.
    """
    ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def peak_bytes(device: torch.device) -> int:
    """The most in use so far: resident memory of the process, or what was allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(
    model: dict, algorithm: str, shape: Shape, overrides: list[str], repeats: int, peak_tflops: float
) -> dict:
    """One row, without its ratio."""
    from megatron_srpo.distributed.layout import initialize, shut_down
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.plan.machine import Workload
    from megatron_srpo.plan.memory import Batch
    from megatron_srpo.plan.step import step_flops
    from megatron_srpo.training.trainer import Trainer, TrainerSettings

    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name), model, algorithm, shape, overrides)
        folder = HFFolder(config.model.hf_path)
        samples = [
            sample
            for group in make_groups(shape, algorithm, folder.architecture.vocab_size)
            for sample in group
        ]
        layout = initialize(config.parallel, seed=1)
        synchronise = torch.cuda.synchronize if layout.device.type == "cuda" else lambda: None
        gc.collect()
        give_back_above(2**16)
        before = peak_bytes(layout.device)
        trainer = Trainer(TrainerSettings.of(config), folder, layout, is_resumed=True)
        steps = []
        for number in range(2 + repeats):
            if number == 2:  # Adam's states are there: the peak is known, and timings may be the usual ones
                extra_bytes = peak_bytes(layout.device) - before
                give_back_above(2**25)
            row, start = {}, time.perf_counter()

            def timed(phase: str, work: Callable, *arguments, row=row):
                begun = time.perf_counter()
                result = work(*arguments)
                synchronise()
                row[f"seconds_{phase}"] = time.perf_counter() - begun
                return result

            batches = timed("pack", trainer.pack, samples)
            targets = timed("teacher", trainer.score_teacher, batches)
            timed("update", trainer.update, batches, targets)
            steps.append({"seconds": time.perf_counter() - start, **row})
        best = min(steps[2:], key=lambda step: step["seconds"])
        responses = sum(sample.policy_tokens for sample in samples)
        distilled = sum(sample.policy_tokens for sample in samples if sample.route.distillation_weight)
        workload = Workload(shape.prompt_tokens, responses // len(samples), distilled / responses)
        flops = sum(step_flops(folder.architecture, config, workload).values())
        tokens = sum(len(sample.prompt.ids) + sample.policy_tokens for sample in samples)
        fullest = max(batches[0].micro_batches, key=lambda row: len(row.ids))
        batch = Batch(len(fullest.ids), len(fullest.targets), distilled)
        shut_down(layout)
    row = {
        "name": algorithm,
        **best,
        "tokens_per_second": tokens / best["seconds"],
        "extra_bytes": extra_bytes,
    }
    row |= {"mfu": flops / best["seconds"] / (1e12 * peak_tflops) if peak_tflops else None, "batch": batch}
    return row


def in_own_process(work: Callable, *arguments):
    """The result of `work`.

    Forked, so that imports are not part of what is measured; afresh where CUDA is, which cannot be forked.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument(
        "--width", type=int, help="hidden size instead of the shape's own, and a third of the feed-forward's"
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=256)
    parser.add_argument(
        "--routed-share", type=float, default=0.25, help="of SRPO's samples, those that are distilled"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0 if torch.cuda.is_available() else 0.0,
        help="for mfu; 0: none",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    quieten_libraries()
    import megatron_srpo.training.trainer  # noqa: F401  (imported once, before the rows' processes are forked)

    torch.set_num_threads(options.threads)
    model = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    if options.width:
        model |= {"hidden_size": options.width, "intermediate_size": 3 * options.width}
    shape = Shape(
        options.prompts, options.samples, options.prompt_tokens, options.response_tokens, options.routed_share
    )
    rows = [
        in_own_process(
            measure, model, algorithm, shape, options.overrides, options.repeats, options.peak_tflops
        )
        for algorithm in options.algorithms
    ]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {options.threads} threads"
    )
    told = {"model": {"name": options.shape, **SHARED, **model}, **dataclasses.asdict(shape)}
    told |= {"overrides": options.overrides, "peak_tflops": options.peak_tflops}
    report = {"device": name, "date": datetime.date.today().isoformat(), "shape": told, "rows": rows}
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    print(json.dumps(report) if options.json else table(report))


def table(report: dict) -> str:
    """For people."""
    lines = [f"{report['device']}, {report['date']}, {report['shape']}"]
    for row in report["rows"]:
        phases = "  ".join(
            f"{key.removeprefix('seconds_')} {value:.3f}"
            for key, value in row.items()
            if key.startswith("seconds_")
        )
        mfu = f"  mfu {row['mfu']:.1%}" if row.get("mfu") else ""
        memory = f"  +{row['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in row else ""
        lines.append(
            f"{row['name']:>12}  {row['seconds']:8.3f} s  {row['ratio']:5.2f}  {phases}{mfu}{memory}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
