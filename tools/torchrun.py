"""torchrun whose exit status is the first failed rank's: 75 for a run that was asked to leave, where torchrun itself says 1.

    python tools/torchrun.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m megatron_srpo train CONFIG

SIGUSR1 is left to the ranks, each of which Slurm signals, too: they save themselves and leave, and torchrun with them.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """Returns the exit status."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end torchrun; the ranks set a handler of their own
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())
