"""Load HF folders at several layouts; write packed documents' logits and the exported tensors.

Every rank runs this script.

    torchrun --nproc-per-node N tests/distributed/weights_worker.py jobs.json

jobs.json: [{"config": path, "overrides": [...], "documents": [[ids], …], "output": file}, …]; `output` holds
"logits" [T, vocab] as computed with the vocabulary sharded, and every exported tensor under "export.". Every
rank must export the same stream.
"""

import hashlib
from pathlib import Path

from worker import each_job


def run(job: dict) -> None:
    """Write the logits and exported tensors of one layout."""
    import torch
    import torch.distributed as dist
    from packed import row_of
    from safetensors.torch import save_file

    from megatron_srpo.config.load import load_config
    from megatron_srpo.distributed.layout import initialize, shut_down
    from megatron_srpo.distributed.megatron import parallel_state
    from megatron_srpo.model.build import build_chunks
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.training.schedule import run_schedule
    from megatron_srpo.weights.transfer import export, load

    config = load_config(Path(job["config"]), job["overrides"])
    folder = HFFolder(config.model.hf_path)
    layout = initialize(config.parallel, seed=1)
    chunks = build_chunks(folder.architecture, config.model, config.parallel, config.megatron, layout.device)
    load(chunks, folder)
    # Every token is a "response" token but the first, so every position's logits but the last come back.
    total = -(-sum(len(ids) - 1 for ids in job["documents"]) // 4) * 4
    results = {}

    def keep(number, hidden, model):
        local = hidden @ model.output_weight.t()
        shards = [torch.empty_like(local) for _ in range(layout.tensor_parallel_size)]
        dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        results["logits"] = torch.cat(shards, dim=1)[:, : folder.architecture.vocab_size].contiguous()
        return hidden.new_zeros(())

    run_schedule(
        chunks, [row_of(job["documents"], total)] * (layout.pipeline_parallel_size), keep, backward=False
    )
    exported = {
        f"export.{name}": tensor.detach().clone() for name, tensor in export(chunks, folder.architecture)
    }
    digest = hashlib.sha256()
    for name, tensor in exported.items():  # in the order of the stream
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert len(set(layout.gather_bytes(digest.digest()))) == 1, "ranks exported different streams"
    if layout.is_last_stage and layout.tensor_parallel_rank == 0 and layout.data_parallel_rank == 0:
        save_file({**results, **exported}, job["output"])
    dist.barrier()
    shut_down(layout)


if __name__ == "__main__":
    each_job(run)
