"""Move the teacher's copy away from a constant student and let it follow.

Every rank runs this script.

    torchrun --nproc-per-node N tests/distributed/teacher_worker.py jobs.json

jobs.json: [{"config": path, "overrides": [...], "output": file}, …]; `output` gets {"ratios": the distance
after each `follow` over the one before, as float64 means over all parameters of this rank 0, "elements": fp32
numbers kept by the data-parallel ranks, "parameters": those of their models, replicas counted once, …}.
"""

import json
from pathlib import Path

from worker import each_job


def run(job: dict) -> None:
    """Measure the distances at one layout."""
    import torch

    from megatron_srpo.config.load import load_config
    from megatron_srpo.distributed.layout import initialize, shut_down
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.training.trainer import Trainer, TrainerSettings

    config = load_config(Path(job["config"]), job["overrides"])
    layout = initialize(config.parallel, seed=1)
    trainer = Trainer(TrainerSettings.of(config), HFFolder(config.model.hf_path), layout)
    teacher = [parameter for chunk in trainer.teacher.chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for parameter in teacher:
            parameter.add_(1.0)

    def distance() -> float:
        pairs = zip(teacher, trainer.parameters, strict=True)
        return sum((slow.double() - fast.double()).sum().item() for slow, fast in pairs)

    distances = [distance()]
    for _ in range(3):
        trainer.teacher.follow(trainer.optimizer, trainer.parameters)
        distances.append(distance())
    kept = torch.tensor([sum(share.numel() for share in trainer.teacher.shares)])
    layout.sum_over_data_parallel(kept)
    if layout.rank == 0:
        ratios = [after / before for before, after in zip(distances, distances[1:], strict=False)]
        named = [item for chunk in trainer.teacher.chunks for item in chunk.named_parameters()]
        experts = config.parallel.expert_model_parallel_size  # data-parallel ranks that hold other experts
        total = sum(parameter.numel() * (experts if ".experts." in name else 1) for name, parameter in named)
        report = {
            "ratios": ratios,
            "elements": int(kept),
            "parameters": total,
            "fp32": teacher_is_fp32(trainer),
        }
        Path(job["output"]).write_text(json.dumps(report))
    shut_down(layout)


def teacher_is_fp32(trainer) -> bool:
    """Return whether every share of the EMA is fp32, whatever the model's dtype."""
    import torch

    return all(share.dtype == torch.float32 for share in trainer.teacher.shares)


if __name__ == "__main__":
    each_job(run)
