"""Load converted checkpoints with megatron-core itself at several layouts, and save some.

Every rank runs this script.

    torchrun --nproc-per-node N tests/distributed/convert_worker.py jobs.json

jobs.json: [{"config": path, "overrides": [...], "checkpoint": folder, "save": folder or null, "stacked":
bool, "output": file}, …]. `output` gets, of each rank, the names of parameters that differ from what
weights/transfer.load puts there, how many were compared, and what else was loaded. stacked: whether
the layers of what is saved share keys, as is Megatron's default.
"""

import json
from pathlib import Path

from worker import each_job


def run(job: dict) -> None:
    """Load and compare at one layout; save where the job says so."""
    import torch
    import torch.distributed as dist

    from megatron_srpo.config.load import load_config
    from megatron_srpo.distributed.layout import initialize, shut_down
    from megatron_srpo.model.build import build_chunks
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.weights.transfer import load

    from megatron.core import dist_checkpointing  # isort: skip  (after the CPU stand-ins)
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip

    filesystem_async._process_memory = lambda: 0  # only to log it, megatron-core needs psutil
    config = load_config(Path(job["config"]), job["overrides"])
    folder = HFFolder(config.model.hf_path)
    layout = initialize(config.parallel, seed=1)
    chunks = build_chunks(folder.architecture, config.model, config.parallel, config.megatron, layout.device)
    load(chunks, folder)
    expected = [
        {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()} for chunk in chunks
    ]
    if job["save"]:
        if layout.rank == 0:
            Path(job["save"]).mkdir()
        dist.barrier()
        metadata = {"non_homogeneous_layers": not job["stacked"], "dp_cp_group": layout.data_parallel_group}
        saved = {f"model{n}": chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}
        dist_checkpointing.save(saved, job["save"])
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    requested = {f"model{n}": chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(requested, job["checkpoint"])
    wrong, compared = [], 0
    for n, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded.pop(f"model{n}"))  # strict: all it asks for is there, and nothing else
        for name, parameter in chunk.named_parameters():
            compared += 1
            if not torch.equal(parameter, expected[n][name]):
                wrong.append(f"rank {layout.rank}: {n}.{name}")
    reports = layout.gather_bytes(
        json.dumps({"wrong": wrong, "compared": compared, "unexpected": list(loaded)}).encode()
    )
    if layout.rank == 0:
        Path(job["output"]).write_text("[" + ",".join(report.decode() for report in reports) + "]")
    dist.barrier()
    shut_down(layout)


if __name__ == "__main__":  # saving starts processes that import this file again
    each_job(run)
