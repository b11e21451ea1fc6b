"""Run by torchrun: the second rank falls asleep in its second step, for ever.

Arguments: configuration file, overrides.
"""

import sys
import threading
import time
from pathlib import Path

from megatron_srpo.__main__ import quieten_libraries


def fall_asleep() -> None:
    """What the stack trace must name."""
    time.sleep(10_000)


if __name__ == "__main__":
    quieten_libraries()
    from megatron_srpo.config.load import load_config
    from megatron_srpo.distributed.heartbeat import PROGRESS
    from megatron_srpo.distributed.layout import Layout
    from megatron_srpo.train import train
    from megatron_srpo.training.trainer import Trainer

    def beat_until_step_2() -> None:
        """Let the limit count from the step with the sleep: building the trainer may take longer."""
        while PROGRESS.step < 2:
            PROGRESS.beat()
            time.sleep(0.1)

    score = Trainer.score_teacher

    def score_teacher(self, batches):
        """As it was, but for one rank and step."""
        layout: Layout = self.layout
        if layout.rank == 1 and PROGRESS.step == 2:
            fall_asleep()
        return score(self, batches)

    Trainer.score_teacher = score_teacher
    threading.Thread(target=beat_until_step_2, daemon=True).start()
    train(load_config(Path(sys.argv[1]), sys.argv[2:]))
