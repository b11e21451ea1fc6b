"""What the loss saw of single tokens, of the few samples that people will look at."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from torch import Tensor

from megatron_srpo.data.records import SampleKey
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.packing import MicroBatch, OptimizerBatch
from megatron_srpo.training.teacher import TeacherTargets
from megatron_srpo.vocab_parallel.fused import Statistics
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.vocab_parallel.top_tokens import top_tokens

TOP = 5


class TokenValues:
    """Collects token-level values of `chosen` samples during an update. All ranks have the same `chosen`.

    A row: prompt_id, index and, one value a response token, logprob (the policy's, of the sampled token,
    before this sample's update), entropy, top (the policy's likeliest [id, logprob]); of distilled samples
    also divergence, teacher_entropy, weight, teacher_logprob, teacher_top. Nats, at the rollout temperature.
    """

    def __init__(self, chosen: Collection[SampleKey], layout: Layout, temperature: float):
        self.chosen, self.layout, self.temperature = set(chosen), layout, temperature
        self.rows: list[dict[str, Any]] = []

    def note(
        self,
        batch: OptimizerBatch,
        micro_batch: MicroBatch,
        values: Statistics,
        of_teacher: tuple[Tensor, Tensor],
        hidden: Tensor,
        model: PolicyModel,
        targets: TeacherTargets,
    ) -> None:
        """One micro-batch on the last stage, on all its tensor-parallel ranks. of_teacher: entropies and
        weights of its first tokens.
        """
        start, lengths, distilled = 0, micro_batch.response_lengths, batch.distilled_count(micro_batch)
        for number, document in enumerate(micro_batch.documents):
            rows = slice(start, start := start + lengths[number])
            sample = batch.samples[document.key]
            if (sample.prompt.id, sample.index) not in self.chosen:
                continue
            ids = micro_batch.targets[rows].to(hidden.device)
            policy = Projection(hidden.detach()[rows], model.output_weight.detach())
            top = top_tokens(policy, ids, model.vocab_shard, TOP, self.temperature)
            row = {"prompt_id": sample.prompt.id, "index": sample.index, "top": _pairs(top.ids, top.logprobs)}
            row |= {"logprob": _short(values.logprob[rows]), "entropy": _short(values.entropy[rows])}
            if number < distilled:
                entropy, weight = (vector[rows] for vector in of_teacher)
                top = top_tokens(
                    targets.logits([document.key]), ids, model.vocab_shard, TOP, self.temperature
                )
                row |= {
                    "divergence": _short(values.divergence[rows]),
                    "teacher_entropy": _short(entropy),
                    "weight": _short(weight),
                }
                row |= {
                    "teacher_logprob": _short(top.target_logprob),
                    "teacher_top": _pairs(top.ids, top.logprobs),
                }
            self.rows.append(row)

    def gather(self) -> list[dict[str, Any]]:
        """Every rank's rows, on every rank; all ranks together.

        What context-parallel ranks have of a sample becomes one row.
        """
        speaks = self.layout.is_last_stage and self.layout.tensor_parallel_rank == 0
        mine = "\n".join(json.dumps(row) for row in self.rows) if speaks else ""
        whole: dict[SampleKey, dict[str, Any]] = {}
        for line in (
            line
            for payload in self.layout.gather_bytes(mine.encode())
            for line in payload.decode().splitlines()
        ):
            row = json.loads(line)
            before = whole.setdefault((row["prompt_id"], row["index"]), row)
            if before is not row:  # ranks come in the order of their shares (`runtime.context`)
                before.update(
                    {name: before[name] + values for name, values in row.items() if isinstance(values, list)}
                )
        return list(whole.values())


def _short(values: Tensor) -> list[float]:
    """Five digits are enough to look at."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _pairs(ids: Tensor, logprobs: Tensor) -> list[list[list[float]]]:
    return [
        [list(pair) for pair in zip(i, _short(p), strict=True)]
        for i, p in zip(ids.tolist(), logprobs.cpu(), strict=True)
    ]
