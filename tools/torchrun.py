"""torchrun whose exit status is the first failed rank's: 75 for a run that was asked to leave, where torchrun
itself says 1.

    python tools/torchrun.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m
    megatron_srpo train CONFIG

SIGUSR1 is left to the ranks, each of which Slurm signals, too: they save themselves and leave, and torchrun
with them. SIGTERM, which Kubernetes sends to this process alone, is handed to the ranks, which take the time
they need: torchrun itself would kill them after 30 seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def hand_to_ranks(number: int, frame) -> None:
    """Signal the ranks and go on waiting for them; where there are none yet, leave."""
    ranks = [
        int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()
    ]
    for rank in ranks:
        os.kill(rank, number)
    if not ranks:
        sys.exit(128 + number)


def run() -> int:
    """Returns the exit status."""
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # it would end torchrun; the ranks set a handler of their own
    signal.signal(signal.SIGTERM, hand_to_ranks)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's own handlers
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())
