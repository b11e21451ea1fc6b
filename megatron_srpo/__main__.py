"""python -m megatron_srpo train CONFIG.yaml [section.key=value …] — with torchrun for more than one process."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from megatron_srpo.plan.arguments import add_arguments

INTERRUPTED = 75  # sysexits.h's EX_TEMPFAIL: come again


def main() -> int:
    """Parse the command line and run it. Returns the exit status: 2 for a configuration that cannot be run, 1 for a run that
    cannot go on, 75 for one that was asked to leave before its end."""
    parser = argparse.ArgumentParser(prog="python -m megatron_srpo", description="Sample-Routed Policy Optimization on megatron-core")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "train by a configuration file"), ("eval", "evaluate model.hf_path by a configuration file")):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="YAML file, see examples/")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    command = commands.add_parser("plan", help="memory, time and traffic of a configuration, and better layouts; reads no weights")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="before the options")
    add_arguments(command)
    command = commands.add_parser("compare", help="compare evaluations with the first one, by a paired bootstrap over questions")
    command.add_argument("results", nargs="+", type=Path, metavar="DIR", help="folders that eval has written, two or more")
    arguments = parser.parse_args()
    is_first = os.environ.get("RANK", "0") == "0"
    quieten_libraries()

    from megatron_srpo.config import ConfigError, load_config

    try:
        if arguments.command == "compare":
            return compare_results(arguments.results)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.command == "plan":
            from megatron_srpo.plan.command import plan

            return plan(config, arguments)
        if arguments.command == "eval":
            return evaluate_model(config, is_first)
        from megatron_srpo.checkpoint.saver import SaveFailed
        from megatron_srpo.train import TrainingInterrupted, TrainingStopped, train

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
    except ConfigError as error:
        if is_first:
            print(f"configuration error: {error}", file=sys.stderr, flush=True)
        else:  # every rank finds the same error; torchrun ends all of them when one leaves, so let the first speak before
            time.sleep(5)
        return 2
    return 0


def evaluate_model(config, is_first: bool) -> int:
    """The eval command. Returns the exit status."""
    from megatron_srpo.evaluate import run_evaluation

    directory = run_evaluation(config)
    if is_first:
        print((directory / "result.md").read_text(encoding="utf-8"))
        print(f"result folder: {directory}  (result.json, result.md, samples/)")
    return 0


def compare_results(directories: list[Path]) -> int:
    """The compare command. Returns the exit status."""
    from megatron_srpo.config import ConfigError
    from megatron_srpo.observe.scoreboard import compare

    if len(directories) < 2:
        raise ConfigError("compare: expected two folders or more")
    print(compare(directories))
    return 0


def quieten_libraries() -> None:
    """Before torch and Megatron are imported: their errors only, and the settings they read from the environment."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron needs it for tensor parallelism on Hopper and before
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", module="megatron|torch|transformers")


if __name__ == "__main__":
    sys.exit(main())
