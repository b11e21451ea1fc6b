"""python -m megatron_srpo train CONFIG.yaml [section.key=value …] — with torchrun for more than one process."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
import warnings
from pathlib import Path

INTERRUPTED = 75  # sysexits.h's EX_TEMPFAIL: come again


def main() -> int:
    """Parse the command line and run it. Returns the exit status: 2 for a configuration that cannot be run, 1
    for a run that cannot go on, 75 for one that was asked to leave before its end, 130 after Ctrl-C.
    """
    arguments = command_line().parse_args()
    is_first = os.environ.get("RANK", "0") == "0"
    quieten_libraries()
    try:
        from megatron_srpo.config.schema import ConfigError
        from megatron_srpo.distributed.files import FileError

        status = run(arguments, is_first)
    except KeyboardInterrupt:  # before the others, which may not be imported yet
        if is_first:
            print("interrupted", file=sys.stderr)
        status = 130
    except (ConfigError, FileError) as error:
        if is_first:
            kind = "configuration error: " if isinstance(error, ConfigError) else "error: "
            print(f"{kind}{error}", file=sys.stderr, flush=True)
        else:  # every rank finds the same error; torchrun ends all of them when one leaves, so let the first speak before
            time.sleep(5)
        status = 2
    except Exception:
        if not _is_among_others():
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    if (
        _is_among_others()
    ):  # a rank that failed alone: Python's own end would wait, in NCCL, for ranks that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_among_others() -> bool:
    """Whether this process is still in a group with other ranks."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


def command_line() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_srpo", description="Sample-Routed Policy Optimization on megatron-core"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    by_configuration = {
        "train": "train by a configuration file",
        "sample": "sample, verify and dump train.steps batches without training",
        "eval": "evaluate model.hf_path by a configuration file",
    }
    for name, text in by_configuration.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="YAML file, see examples/")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="section.key=value",
            help="settings that replace the file's",
        )
    command = commands.add_parser(
        "plan", help="memory, time and traffic of a configuration, and better layouts; reads no weights"
    )
    command.add_argument("config", type=Path)
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="before the options"
    )
    _add_plan_arguments(command)
    command = commands.add_parser(
        "compare", help="compare evaluations with the first one, by a paired bootstrap over questions"
    )
    command.add_argument(
        "results", nargs="+", type=Path, metavar="DIR", help="folders that eval has written, two or more"
    )
    command = commands.add_parser(
        "report", help="write one HTML page with the curves and samples of one or more runs"
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder"
    )
    command = commands.add_parser(
        "inspect", help="show a step's samples, or one of them token by token, in the terminal"
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--step", type=int, required=True)
    command.add_argument("--sample", type=int, help="number in the step, from 0; default: list them")
    command = commands.add_parser("config", help="print every key of the configuration, or check a file")
    command.add_argument(
        "--check", type=Path, metavar="FILE", help="find what is wrong with it, without starting anything"
    )
    command.add_argument(
        "--processes", type=int, help="that the run will have; default: as few as its layout needs"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="with --check: replace the file's",
    )
    return parser


def _add_plan_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    command.add_argument("--gpus", type=int, default=8, help="training processes, one a GPU (default 8)")
    command.add_argument("--machine", default="h100", help="h100 (default), h200, h20, a100 or cpu")
    command.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="10⁹ bytes a GPU, instead of the machine's"
    )
    command.add_argument(
        "--peak-tflops", type=float, help="bf16 matrix products of one GPU, dense, instead of the machine's"
    )
    command.add_argument(
        "--mfu", type=float, help="share of the peak that training reaches (default: assumed 0.4)"
    )
    command.add_argument(
        "--prompt-tokens", type=int, help="mean (default: an eighth of rollout.max_prompt_tokens)"
    )
    command.add_argument(
        "--response-tokens", type=int, help="mean (default: an eighth of rollout.max_response_tokens)"
    )
    command.add_argument(
        "--distilled-share", type=float, help="of response tokens (default: srpo 0.25, grpo 0, others 1)"
    )
    command.add_argument(
        "--scale", action="store_true", help="the step on --gpus … 4096 GPUs, and where it stops scaling"
    )


def run(arguments: argparse.Namespace, is_first: bool) -> int:
    """The command that was asked for.

    Returns its exit status; raises ConfigError or FileError for what the user can put right.
    """
    if arguments.command == "compare":
        return compare_results(arguments.results)
    if arguments.command == "report":
        return report_runs(arguments.runs, arguments.output)
    if arguments.command == "inspect":
        return inspect_run(arguments.run, arguments.step, arguments.sample)
    if arguments.command == "config":
        return explain_config(arguments.check, arguments.overrides, arguments.processes)

    from megatron_srpo.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.command == "plan":
        from megatron_srpo.plan.command import plan

        return plan(config, arguments)
    from megatron_srpo.rollout.engine import EngineFailed

    try:
        return {"train": train_model, "sample": sample_batches, "eval": evaluate_model}[arguments.command](
            config, is_first
        )
    except EngineFailed as error:  # which can happen to any rank alone
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"stopped: logging.dir: {config.logging.dir}: {error.strerror}; make room and give the command again",
            file=sys.stderr,
        )
        return 1


def train_model(config, is_first: bool) -> int:
    """The train command. Returns the exit status."""
    from megatron_srpo.checkpoint.saver import SaveFailed
    from megatron_srpo.observe.reporter import TrainingStopped
    from megatron_srpo.train import TrainingInterrupted, train

    try:
        train(config)
    except (TrainingStopped, SaveFailed) as error:
        if is_first:
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as error:
        if is_first:
            print(error, file=sys.stderr)
        return INTERRUPTED
    return 0


def sample_batches(config, is_first: bool) -> int:
    """The sample command. Returns the exit status."""
    from megatron_srpo.commands.sample import sample

    sample(config)
    return 0


def evaluate_model(config, is_first: bool) -> int:
    """The eval command. Returns the exit status."""
    from megatron_srpo.evaluation.evaluate import run_evaluation

    directory = run_evaluation(config)
    if is_first:
        print((directory / "result.md").read_text(encoding="utf-8"))
        print(f"result folder: {directory}  (result.json, result.md, samples/)")
    return 0


def compare_results(directories: list[Path]) -> int:
    """The compare command. Returns the exit status."""
    from megatron_srpo.config.schema import ConfigError
    from megatron_srpo.evaluation.scoreboard import compare

    if len(directories) < 2:
        raise ConfigError("compare: expected two folders or more")
    print(compare(directories))
    return 0


def report_runs(runs: list[Path], output: Path | None) -> int:
    """The report command. Returns the exit status."""
    from megatron_srpo.distributed.files import FileError
    from megatron_srpo.observe.report import write_report

    output = output or runs[0] / "report.html"
    try:
        write_report(runs, output)
    except OSError as error:
        raise FileError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"report: {output}  ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


def inspect_run(run: Path, step: int, sample: int | None) -> int:
    """The inspect command. Returns the exit status."""
    from rich.console import Console

    from megatron_srpo.observe.inspect import inspect

    inspect(run, step, sample, Console(highlight=False))
    return 0


def explain_config(file: Path | None, overrides: list[str], processes: int | None) -> int:
    """The config command. Returns the exit status."""
    from megatron_srpo.commands.config import check, print_keys
    from megatron_srpo.config.schema import ConfigError

    if file is None:
        if overrides:
            raise ConfigError(f"config: {overrides[0]!r} needs --check FILE")
        print_keys()
    else:
        print(check(file, overrides, processes))
    return 0


def quieten_libraries() -> None:
    """Before torch and Megatron are imported: their errors only, and the settings they read from the
    environment.
    """
    os.environ.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    )  # Megatron needs it for tensor parallelism on Hopper and before
    os.environ.setdefault(
        "NCCL_CUMEM_ENABLE", "0"
    )  # as SGLang's servers set it: NCCL hangs or fails where two sides of a group differ
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", module="megatron|torch|transformers")


if __name__ == "__main__":
    sys.exit(main())
