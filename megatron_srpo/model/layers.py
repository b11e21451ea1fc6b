"""Local replacements of Transformer Engine's layers: RMSNorm, and attention over packed documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from megatron_srpo.distributed.context_parallel import ContextParallel, gathered_positions
from megatron_srpo.distributed.megatron import (
    MegatronModule,
    PackedSeqParams,
    RotaryEmbedding,
    parallel_state,
    tensor_parallel,
)
from megatron_srpo.model.packed_row import AttentionBatch, Documents, attention_batches


class RMSNorm(torch.nn.Module):
    """x / rms(x) · weight in fp32; the weight is marked for the all-reduce of sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight = torch.nn.Parameter(ones)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclasses.dataclass
class PackedRow(PackedSeqParams):
    """A packed row as the local layers need it; Megatron hands it from the model to every layer.

    Attributes:
        cos: Rotary cosines of this rank's tokens, [t, 1, d].
        sin: Rotary sines, likewise.
        batches: The row's attention.
        order: For each of this rank's tokens its place in the outputs of all batches, [t]; None if in order.
        gathered: With context parallelism the place of each token of the row after the ranks' parts are
            concatenated, [T].
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    batches: Sequence[AttentionBatch] = ()
    order: Tensor | None = None
    gathered: Tensor | None = None

    @classmethod
    def of(
        cls,
        documents: Documents,
        context: ContextParallel,
        positions: Tensor,
        rotary: RotaryEmbedding,
        dtype: torch.dtype,
    ) -> PackedRow:
        """Return the row of `documents` whose tokens on this rank have `positions` [t] in their sequences."""
        device = positions.device
        batches = attention_batches(documents, context, device, dtype)
        queries = torch.cat([_as_tensor(batch.queries.rows, device) for batch in batches])
        is_in_order = bool((queries.diff() == 1).all())
        gathered = None
        if context.size > 1:
            gathered = gathered_positions(torch.tensor(documents.bounds), context.size).to(device)
        angles = rotary.get_emb(int(positions.max()) + 1)[positions][:, 0]
        return cls(
            qkv_format="thd",
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            batches=batches,
            order=None if is_in_order else queries.argsort(),
            gathered=gathered,
        )


class PackedAttention(MegatronModule):
    """Rotary embedding and causal (grouped-query) attention in the documents of a `PackedRow`, by SDPA.

    Query [t, heads, d], key and value [t, kv_heads, d] → [t, heads · d]. Context parallelism: one all-gather
    of keys and values forward, one reduce-scatter backward.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale
        if config.attention_dropout:
            raise ValueError("attention_dropout is not supported by the local attention")

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask,
        *,
        packed_seq_params: PackedRow,
        **_,
    ) -> Tensor:
        row = packed_seq_params
        query, key = _rotated(query, row), _rotated(key, row)
        if row.gathered is not None:
            group = parallel_state.get_context_parallel_group()
            both = torch.stack([key, value], dim=1)
            both = tensor_parallel.gather_from_sequence_parallel_region(both, group=group)
            key, value = both[row.gathered].unbind(1)
        outputs = torch.cat([self._attend(batch, query, key, value) for batch in row.batches])
        return (outputs if row.order is None else outputs.index_select(0, row.order)).flatten(1)

    def _attend(self, batch: AttentionBatch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the outputs of a batch's queries, [queries, heads, d], in their order."""
        query = batch.queries.pad(query).transpose(1, 2)
        both = [batch.keys.pad(tensor) for tensor in (key, value)]
        if (prefixes := batch.prefixes) is not None:
            count = batch.keys.count // prefixes.count
            shared = [prefixes.pad(tensor)[:, None] for tensor in (key, value)]
            shared = [tensor.expand(-1, count, *tensor.shape[2:]).flatten(0, 1) for tensor in shared]
            both = [torch.cat(pair, dim=1) for pair in zip(shared, both, strict=True)]
        key, value = (tensor.transpose(1, 2) for tensor in both)
        options: Any = {"scale": self.scale, "enable_gqa": query.shape[1] != key.shape[1]}
        mask = batch.mask
        output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **options)
        return batch.queries.unpad(output.transpose(1, 2))


def _rotated(tensor: Tensor, row: PackedRow) -> Tensor:
    """Apply the rotary embedding, x · cos + rotate_half(x) · sin, to [t, heads, d]."""
    assert row.cos is not None and row.sin is not None
    first, second = tensor.chunk(2, dim=-1)
    return tensor * row.cos + torch.cat([-second, first], dim=-1) * row.sin


def _as_tensor(rows: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
