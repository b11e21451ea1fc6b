"""srpo train: train by a configuration file."""

import sys

from megatron_srpo.commands.common import add_config_arguments, configured, is_first_rank
from megatron_srpo.config.schema import Config
from megatron_srpo.data.visible import visible

HELP = "train by a configuration file"
INTERRUPTED = 75  # exit status: EX_TEMPFAIL of sysexits.h, run the same command again

add_arguments = add_config_arguments


@configured
def run(config: Config) -> int:
    """Train; return 1 if the run was stopped by an error, INTERRUPTED on request."""
    from megatron_srpo.checkpoint.run import TrainingInterrupted
    from megatron_srpo.checkpoint.saver import SaveFailed
    from megatron_srpo.observe.reporter import TrainingStopped
    from megatron_srpo.train import train

    try:
        train(config)
    except (TrainingStopped, SaveFailed) as error:
        status, message = 1, f"stopped: {error}"
    except TrainingInterrupted as error:
        status, message = INTERRUPTED, str(error)
    else:
        return 0
    if is_first_rank():
        print(visible(message), file=sys.stderr)
    return status
