"""Per-token values of the loss, for a few samples that people will look at."""

from collections.abc import Collection
from itertools import chain
from typing import Any

from torch import Tensor

from megatron_srpo.data.records import SampleKey
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.training.batch_plan import OptimizerBatch
from megatron_srpo.training.packing import MicroBatch
from megatron_srpo.training.teacher import TeacherScores
from megatron_srpo.vocab_parallel.fused import Statistics
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.vocab_parallel.shard import VocabShard
from megatron_srpo.vocab_parallel.top_tokens import top_tokens

TOP = 5


class TokenValues:
    """A recorder of per-token values of the `chosen` samples (the same on all ranks) during an update.

    A row holds lists with one value per policy token, in nats at the rollout temperature. logprob is the
    policy's before the update; top and teacher_top are the likeliest [id, logprob] pairs.
    """

    def __init__(self, chosen: Collection[SampleKey], layout: Layout, temperature: float):
        self.chosen = set(chosen)
        self.layout = layout
        self.temperature = temperature
        self.rows: list[dict[str, Any]] = []

    def record(
        self,
        batch: OptimizerBatch,
        micro_batch: MicroBatch,
        policy: Projection,
        shard: VocabShard,
        statistics: Statistics,
        entropy_weights: Tensor,
        scores: TeacherScores,
    ) -> None:
        """Record one micro-batch, whose distilled tokens come first; on all TP ranks of the last stage."""
        start = 0
        counts = micro_batch.target_counts
        for number, sequence in enumerate(micro_batch.sequences):
            rows = slice(start, start + counts[number])
            start = rows.stop
            sample = batch.samples[sequence.key]
            if (sample.prompt.id, sample.index) not in self.chosen:
                continue
            ids = micro_batch.targets[rows].to(policy.hidden.device)
            own = Projection(policy.hidden.detach()[rows], policy.weight.detach())
            top = top_tokens(own, ids, shard, TOP, self.temperature)
            row = {
                "prompt_id": sample.prompt.id,
                "index": sample.index,
                "top": _pairs(top.ids, top.logprobs),
                "logprob": _short(statistics.logprob[rows]),
                "entropy": _short(statistics.entropy[rows]),
            }
            if number < micro_batch.distilled:
                assert statistics.divergence is not None
                top = top_tokens(scores.logits([sequence.key]), ids, shard, TOP, self.temperature)
                row |= {
                    "divergence": _short(statistics.divergence[rows]),
                    "teacher_entropy": _short(scores.entropy[sequence.key]),
                    "weight": _short(entropy_weights[rows]),
                    "teacher_logprob": _short(top.target_logprob),
                    "teacher_top": _pairs(top.ids, top.logprobs),
                }
            self.rows.append(row)

    def gather(self) -> list[dict[str, Any]]:
        """Return all ranks' rows on every rank; joins a sample's context-parallel parts. A collective."""
        has_rows = self.layout.is_last_stage and self.layout.tensor_parallel_rank == 0
        merged: dict[SampleKey, dict[str, Any]] = {}
        for row in chain.from_iterable(self.layout.gather_json(self.rows if has_rows else [])):
            before = merged.setdefault((row["prompt_id"], row["index"]), row)
            if before is not row:  # ranks are in the order of their parts (ContextParallel.share)
                for name, values in row.items():
                    if isinstance(values, list):
                        before[name] = before[name] + values
        return list(merged.values())


def _short(values: Tensor) -> list[float]:
    """Round to five significant digits."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _pairs(ids: Tensor, logprobs: Tensor) -> list[list[list[float]]]:
    """Return [id, logprob] pairs of each token, from [T, K] tensors."""
    pairs: list[list[list[float]]] = []
    for token_ids, values in zip(ids.tolist(), logprobs.cpu(), strict=True):
        pairs.append([list(pair) for pair in zip(token_ids, _short(values), strict=True)])
    return pairs
