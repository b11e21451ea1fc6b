"""Measure one training step by phase, without sampling: GRPO, SDPO and SRPO.

All use the same batch and random weights.

    python tools/bench/bench_step.py --shape 1.7b --prompts 32 --samples 8 --response-tokens 1000
        [--routed-share 0.25] [--silent-share 0.5] [--demonstrations 1] [--baseline REF] [--json]
        [section.key=value …]

Each row runs in a process of its own. Its `seconds` are the best of `--rounds` steps after two others:
`seconds_pack`, `seconds_teacher`, `seconds_update`. `ratio` is to the first row; `tokens_per_second` counts
all tokens trained on; `mfu` is of the FLOP that `plan.step.step_flops` counts, on the stated peak;
`extra_bytes` is the peak above a process that has its imports, `batch` the fullest micro-batch as
`plan.memory.Batch`. All rows make one optimizer step. With --baseline each row is followed by that commit's,
by its own bench_step.py, where every distilled sample sees a demonstration of its own, of the same length.
Arguments section.key=value override the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from _baseline import baseline_tree, find_script, run_json
from _memory import peak_resident_bytes, return_freed_above
from _models import SIZES, qwen3_config
from _report import Row, add_ratios, device_name, make_parser, publish
from _silent import silence

from megatron_srpo.__main__ import quieten_libraries
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ALGORITHMS = ("grpo", "sdpo", "srpo")
WARM_UP = 2  # steps that are not measured


@dataclasses.dataclass(frozen=True)
class Shape:
    """Describe the batch and model to measure.

    Lengths are means: responses spread evenly from a half to one and a half of theirs.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    routed_share: float
    silent_share: float
    demonstrations: int = 1  # that a group's distilled samples see


def make_config(folder: Path, model: dict, algorithm: str, shape: Shape, overrides: list[str]) -> Config:
    """Return the run's configuration; write the model's config.json, without weights: they stay random."""
    (folder / "config.json").write_text(json.dumps(model))
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
    """Return random tokens, the same for every algorithm.

    SRPO distills `routed_share` of the samples, SDPO all of them, GRPO none.
    """
    rng, groups = random.Random(0), []
    share = {"grpo": 0.0, "sdpo": 1.0}.get(algorithm, shape.routed_share)
    draw = lambda length: tuple(rng.choices(range(vocab_size), k=length))  # noqa: E731
    for number in range(shape.prompts):
        prompt = Prompt(id=str(number), task="random", messages=(), answer="", ids=draw(shape.prompt_tokens))
        teachers = [
            prompt.ids + draw(shape.response_tokens + 40)
            for _ in range(min(shape.demonstrations, shape.samples))
        ]
        group = []
        for index in range(shape.samples):
            half = shape.response_tokens // 2
            response = draw(max(1, rng.randint(half, shape.response_tokens + half)))
            teacher_ids = teachers[index % len(teachers)]
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
    return silence(groups, shape.silent_share)


def peak_bytes(device: torch.device) -> int:
    """Return the peak so far: resident memory of the process, or what was allocated on the GPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident_bytes()


class Stopwatch:
    """Measure the seconds of one step by phase, as the keys of its row."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block, until the device has done its work."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


def measure(model: dict, algorithm: str, shape: Shape, options: argparse.Namespace) -> Row:
    """Return one row without its ratio."""
    from megatron_srpo.distributed.layout import initialize, shut_down
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.plan.machine import Workload
    from megatron_srpo.plan.memory import Batch
    from megatron_srpo.plan.step import step_flops
    from megatron_srpo.training.trainer import Trainer, TrainerSettings

    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name), model, algorithm, shape, options.overrides)
        folder = HFFolder(config.model.hf_path)
        groups = make_groups(shape, algorithm, folder.architecture.vocab_size)
        samples = [sample for group in groups for sample in group]
        layout = initialize(config.parallel, seed=1)
        gc.collect()
        return_freed_above(2**16)
        before = peak_bytes(layout.device)
        trainer = Trainer(TrainerSettings.of(config), folder, layout, is_resumed=True)
        steps, extra_bytes, batches = [], 0, []
        for number in range(WARM_UP + options.rounds):
            if number == WARM_UP:  # Adam's states exist: the peak is known, and timings may be the usual ones
                extra_bytes = peak_bytes(layout.device) - before
                return_freed_above(2**25)
            watch, start = Stopwatch(layout.device), time.perf_counter()
            with watch.phase("pack"):
                batches = trainer.pack(groups)
            with watch.phase("teacher"):
                scores = trainer.score_teacher(batches)
            with watch.phase("update"):
                trainer.update(batches, scores)
            steps.append({"seconds": time.perf_counter() - start, **watch.seconds})
        shut_down(layout)
    best = min(steps[WARM_UP:], key=lambda step: step["seconds"])
    responses = sum(sample.policy_tokens for sample in samples)
    distilled = sum(sample.policy_tokens for sample in samples if is_distilled(sample))
    tokens = responses + sum(len(sample.prompt.ids) for sample in samples)
    workload = Workload(shape.prompt_tokens, responses // len(samples), distilled / responses)
    flops = sum(step_flops(folder.architecture, config, workload).values())
    fullest = max(batches[0].micro_batches, key=lambda row: len(row.ids))
    peak = 1e12 * options.peak_tflops
    return {
        "name": algorithm,
        **best,
        "tokens_per_second": tokens / best["seconds"],
        "extra_bytes": extra_bytes,
        "mfu": flops / best["seconds"] / peak if peak else None,
        "batch": Batch(len(fullest.ids), len(fullest.targets), distilled),
    }


def measure_baseline(tree: Path, algorithm: str, options: argparse.Namespace) -> Row:
    """Return the row of another commit's bench_step.py with the same options."""
    settings = {
        "--shape": options.shape,
        "--algorithms": algorithm,
        "--repeats": options.rounds,
        "--peak-tflops": options.peak_tflops,
        "--threads": options.threads,
        "--prompts": options.prompts,
        "--samples": options.samples,
        "--prompt-tokens": options.prompt_tokens,
        "--response-tokens": options.response_tokens,
        "--routed-share": options.routed_share,
        "--layers": options.layers,
        "--width": options.width,
    }
    script = find_script(tree, "bench_step.py")
    command = [sys.executable, str(Path(__file__).with_name("_silent.py")), str(script), options.silent_share]
    for name, value in settings.items():
        if value is not None:
            command += [name, value]
    report = run_json([str(part) for part in [*command, "--json", *options.overrides]], tree)
    return report["rows"][0] | {"name": f"{algorithm} at {options.baseline}"}


def is_distilled(sample: Sample) -> bool:
    """Return whether the sample's route has a distillation term."""
    assert sample.route is not None
    return sample.route.distillation_weight > 0


def in_own_process(work: Callable, *arguments):
    """Run `work` in a process of its own; return its result.

    Forked, so that imports are not measured; spawned where CUDA is, which cannot be forked.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    has_cuda = torch.cuda.is_available()
    parser = make_parser(__doc__, rounds=2, baseline=True)
    add = parser.add_argument
    add("--shape", choices=["tiny", *SIZES], default="0.6b")
    add("--layers", type=int, help="instead of the shape's own")
    add(
        "--width",
        type=int,
        help="hidden size instead of the shape's own; the feed-forward's is three times it",
    )
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    add("--prompts", type=int, default=4)
    add("--samples", type=int, default=8)
    add("--prompt-tokens", type=int, default=128)
    add("--response-tokens", type=int, default=256)
    add("--routed-share", type=float, default=0.25, help="of SRPO's samples, those that are distilled")
    add(
        "--silent-share",
        type=float,
        default=0.0,
        help="of the groups, those with nothing to learn",
    )
    add("--demonstrations", type=int, default=1, help="different ones that a group's distilled samples see")
    add("--peak-tflops", type=float, default=989.0 if has_cuda else 0.0, help="for mfu; 0: none")
    add("--threads", type=int, default=torch.get_num_threads())
    add("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> dict:
    """Return the config.json that the options describe; embeddings are tied in every shape."""
    model = qwen3_config("0.6b") | TINY if options.shape == "tiny" else qwen3_config(options.shape)
    model |= {"tie_word_embeddings": True}
    if options.layers:
        model |= {"num_hidden_layers": options.layers}
    if options.width:
        model |= {"hidden_size": options.width, "intermediate_size": 3 * options.width}
    return model


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    phases = [
        f"{key.removeprefix('seconds_')} {value:.3f}"
        for key, value in row.items()
        if key.startswith("seconds_")
    ]
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] else ""
    memory = f"+{row['extra_bytes'] / 2**20:.0f} MiB"
    return (
        f"{row['name']:>16}  {row['seconds']:8.3f} s  {row['ratio']:5.2f}  {'  '.join(phases)}{mfu}  {memory}"
    )


def main() -> None:
    """Measure each algorithm in a process of its own and publish the report."""
    options = parse_options()
    quieten_libraries()
    # Imported once, before the rows' processes are forked.
    import megatron_srpo.training.trainer  # noqa: F401

    torch.set_num_threads(options.threads)
    model = make_model(options)
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    rows = []
    with baseline_tree(options.baseline) if options.baseline else nullcontext() as tree:
        for algorithm in options.algorithms:
            rows.append(in_own_process(measure, model, algorithm, shape, options))
            if tree is not None:
                rows.append(measure_baseline(tree, algorithm, options))
    add_ratios(rows)
    reported = {
        "model": {"name": options.shape, **model},
        **dataclasses.asdict(shape),
        "overrides": options.overrides,
        "peak_tflops": options.peak_tflops,
    }
    device = device_name(torch.cuda.is_available(), options.threads)
    publish(options, device, reported, rows, format_row)


if __name__ == "__main__":
    main()
