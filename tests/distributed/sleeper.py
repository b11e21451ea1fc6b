"""Run a training in whose second step a rank hangs; started by torchrun.

Arguments: "sleep" (the second rank sleeps forever) or "stop" (the first rank stops itself by SIGSTOP),
configuration file, overrides.
"""

import os
import signal
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

    how, file, *overrides = sys.argv[1:]
    score = Trainer.score_teacher

    def score_teacher(self, batches):
        """Score as before, except on one rank in one step."""
        layout: Layout = self.layout
        if PROGRESS.step == 2 and how == "sleep" and layout.rank == 1:
            fall_asleep()
        if PROGRESS.step == 2 and how == "stop" and layout.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return score(self, batches)

    Trainer.score_teacher = score_teacher
    threading.Thread(target=beat_until_step_2, daemon=True).start()
    train(load_config(Path(file), overrides))
