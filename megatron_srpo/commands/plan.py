"""srpo plan: memory, time and traffic of a configuration."""

import argparse

from megatron_srpo.commands.common import add_config_arguments

HELP = "memory, time and traffic of a configuration, and better layouts; reads no weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration, the machine, and the assumed speed and lengths."""
    models = "a model: its folder, its config.json or a name, Qwen/Qwen3-8B"
    add_config_arguments(parser, f"YAML file; or {models}")
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="training processes, one per GPU (default 8)")
    add("--machine", default="h100", help="h100 (default), h200, h20, a100 or cpu")
    add("--gpu-memory", type=float, metavar="GB", help="10⁹ bytes per GPU, instead of the machine's")
    add("--peak-tflops", type=float, help="dense bf16 TFLOPS of one GPU, instead of the machine's")
    add("--mfu", type=float, help="share of the peak that training reaches (default: assumed 0.4)")
    add("--prompt-tokens", type=int, help="mean (default: an eighth of rollout.max_prompt_tokens)")
    add("--response-tokens", type=int, help="mean (default: an eighth of rollout.max_response_tokens)")
    add("--distilled-share", type=float, help="of response tokens (default: srpo 0.25, grpo 0, others 1)")
    add("--scale", action="store_true", help="the step on --gpus … 4096 GPUs, and where it stops scaling")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, and return its exit status."""
    from megatron_srpo.plan.command import plan

    return plan(arguments)
