"""srpo sample: rollouts without training."""

from megatron_srpo.commands.common import add_config_arguments, configured
from megatron_srpo.config.schema import Config

HELP = "sample, verify and dump train.steps batches without training"

add_arguments = add_config_arguments


@configured
def run(config: Config) -> int:
    """Sample all batches."""
    from megatron_srpo.sampling import sample

    sample(config)
    return 0
