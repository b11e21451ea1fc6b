"""Share one process group between all jobs of a launch.

Imports cost 10 s, a job one.
"""

from __future__ import annotations

import datetime
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_srpo.__main__ import quieten_libraries


def each_job(run: Callable[[dict], None]) -> None:
    """Call `run` with every job in the JSON file named on the command line.

    Training keeps a group open that it did not make.
    """
    quieten_libraries()
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        dist.barrier()
        for group in list(
            dist.distributed_c10d._world.pg_map
        ):  # Megatron drops its groups, but their threads stay: thirty per job
            if group is not dist.group.WORLD and dist.get_rank(group) >= 0:
                dist.destroy_process_group(group)
        del group
        gc.collect()  # reference cycles of the finished trainer still hold them
    dist.destroy_process_group()
