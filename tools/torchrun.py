r"""Run torchrun, but return the first failed rank's exit status.

That is 75 for an interrupted run, where torchrun itself returns 1.

    python tools/torchrun.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m megatron_srpo train CONFIG

SIGUSR1 is ignored here: Slurm signals each rank as well, the ranks save and exit, and torchrun with them.
SIGTERM, which Kubernetes sends to this process alone, is forwarded to the ranks, which take the time they
need: torchrun itself would kill them after 30 seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def forward_to_ranks(number: int, frame) -> None:
    """Signal the ranks and keep waiting for them; exit if there are none yet."""
    ranks = [
        int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()
    ]
    for rank in ranks:
        os.kill(rank, number)
    if not ranks:
        sys.exit(128 + number)


def run() -> int:
    """Run torchrun; return the exit status."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end torchrun; the ranks set their own handler
    signal.signal(signal.SIGTERM, forward_to_ranks)
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
