"""Train or evaluate one configuration file under several lists of overrides.

Every rank runs this script; the jobs run one after the other in the same processes.

    torchrun --nproc-per-node N tests/distributed/layouts.py jobs.json

jobs.json: [{"command": "train" or "eval", "config": path, "overrides": ["section.key=value", …]}, …].
"""

from pathlib import Path

from worker import each_job


def run(job: dict) -> None:
    """Train or evaluate one job."""
    from megatron_srpo.config.load import load_config
    from megatron_srpo.evaluation.run import run_evaluation
    from megatron_srpo.train import train

    {"train": train, "eval": run_evaluation}[job["command"]](
        load_config(Path(job["config"]), job["overrides"])
    )


if __name__ == "__main__":
    each_job(run)
