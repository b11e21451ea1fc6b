"""Run by torchrun: trains one configuration file under several lists of overrides, one after the other, in the same processes.

    torchrun --nproc-per-node N tests/distributed/layouts.py jobs.json

jobs.json: [{"config": path, "overrides": ["section.key=value", …]}, …]. A launch costs 20 s of imports, a layout two.
"""

import datetime
import json
import sys
from pathlib import Path

from megatron_srpo.__main__ import quieten_libraries


def main() -> None:
    quieten_libraries()
    import torch.distributed as dist

    from megatron_srpo.config import load_config
    from megatron_srpo.train import train

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))  # once: train() leaves what it did not make
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(Path(job["config"]), job["overrides"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
