"""Run a training whose second rank sleeps forever in its second step; started by torchrun.

Arguments: configuration file, overrides.
"""

import sys
import threading
import time
from pathlib import Path

from megatron_srpo.__main__ import quieten_libraries


def fall_asleep() -> None:
    """Sleep forever; the stack trace must name this function."""
    time.sleep(10_000)


if __name__ == "__main__":
    quieten_libraries()
    from megatron_srpo.config.load import load_config
    from megatron_srpo.distributed.heartbeat import PROGRESS
    from megatron_srpo.distributed.layout import Layout
    from megatron_srpo.train import train
    from megatron_srpo.training.trainer import Trainer

    def beat_until_step_2() -> None:
        """Report progress until step 2, so that the limit counts from the step with the sleep.

        Building the trainer may take longer.
        """
        while PROGRESS.step < 2:
            PROGRESS.beat()
            time.sleep(0.1)

    score = Trainer.score_teacher

    def score_teacher(self, batches):
        """Score as before, except on one rank in one step."""
        layout: Layout = self.layout
        if layout.rank == 1 and PROGRESS.step == 2:
            fall_asleep()
        return score(self, batches)

    Trainer.score_teacher = score_teacher
    threading.Thread(target=beat_until_step_2, daemon=True).start()
    train(load_config(Path(sys.argv[1]), sys.argv[2:]))
