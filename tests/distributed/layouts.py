"""Run by torchrun: trains one configuration file under several lists of overrides, one after the other, in the same processes.

    torchrun --nproc-per-node N tests/distributed/layouts.py jobs.json

jobs.json: [{"config": path, "overrides": ["section.key=value", …]}, …].
"""

from pathlib import Path

from worker import each_job


def run(job: dict) -> None:
    """One training."""
    from megatron_srpo.config import load_config
    from megatron_srpo.train import train

    train(load_config(Path(job["config"]), job["overrides"]))


if __name__ == "__main__":
    each_job(run)
