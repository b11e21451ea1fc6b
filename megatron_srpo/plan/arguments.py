"""The options of the `plan` command: apart, so that no other command imports the planner."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    command.add_argument("--gpus", type=int, default=8, help="training processes, one a GPU (default 8)")
    command.add_argument("--machine", default="h100", help="h100 (default), h200, h20, a100 or cpu")
    command.add_argument("--gpu-memory", type=float, metavar="GB", help="10⁹ bytes a GPU, instead of the machine's")
    command.add_argument("--peak-tflops", type=float, help="bf16 matrix products of one GPU, dense, instead of the machine's")
    command.add_argument("--mfu", type=float, help="share of the peak that training reaches (default: assumed 0.4)")
    command.add_argument("--prompt-tokens", type=int, help="mean (default: an eighth of rollout.max_prompt_tokens)")
    command.add_argument("--response-tokens", type=int, help="mean (default: an eighth of rollout.max_response_tokens)")
    command.add_argument("--distilled-share", type=float, help="of response tokens (default: srpo 0.25, grpo 0, others 1)")
    command.add_argument("--scale", action="store_true", help="the step on --gpus … 4096 GPUs, and where it stops scaling")
