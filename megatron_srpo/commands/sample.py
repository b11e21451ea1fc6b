"""srpo sample: rollouts without training."""

import argparse

from megatron_srpo.commands.common import add_config_arguments, run_configured
from megatron_srpo.config.schema import Config

HELP = "sample, verify and dump train.steps batches without training"

add_arguments = add_config_arguments


def run(arguments: argparse.Namespace) -> int:
    return run_configured(arguments, _sample)


def _sample(config: Config) -> int:
    from megatron_srpo.sampling import sample

    sample(config)
    return 0
