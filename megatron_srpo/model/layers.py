"""Local replacements of Transformer Engine's layers: RMSNorm, and attention over packed documents."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from megatron_srpo.distributed.context_parallel import gathered_positions
from megatron_srpo.distributed.megatron import MegatronModule, parallel_state, tensor_parallel


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


class PackedAttention(MegatronModule):
    """Causal (grouped-query) attention within each document of a packed `thd` micro-batch, by SDPA.

    Query [t, heads, d], key and value [t, kv_heads, d] → [t, heads · d].
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale
        if config.attention_dropout:
            raise ValueError("attention_dropout is not supported by the local attention")

    @override
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packed_seq_params, **_
    ) -> Tensor:
        if self.config.context_parallel_size > 1:
            return self._shared(query, key, value, packed_seq_params.cu_seqlens_q)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        if len(lengths) * max(lengths) <= 2 * query.shape[0]:
            return self._padded(query, key, value, lengths)
        documents = (tensor.split(lengths) for tensor in (query, key, value))
        outputs = [self._attend(q[None], k[None], v[None])[0] for q, k, v in zip(*documents, strict=True)]
        return torch.cat(outputs).flatten(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Attend in documents of similar length as one batch, with padding that the causal mask hides.

        No row is read twice, because CUDA sums the gradient of a repeated index serially.
        """
        count, longest = len(lengths), max(lengths)
        sizes = torch.tensor(lengths)
        shift = torch.arange(count) * longest - (sizes.cumsum(0) - sizes)  # of each document's rows
        place = (torch.arange(len(query)) + shift.repeat_interleave(sizes)).to(query.device)
        batch = []
        for tensor in (query, key, value):
            padded = tensor.new_zeros(count * longest, *tensor.shape[1:]).index_copy(0, place, tensor)
            batch.append(padded.unflatten(0, (count, longest)))
        return self._attend(*batch).flatten(0, 1).index_select(0, place).flatten(1)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attend from this rank's two chunks of each document to the document's keys up to each chunk's end.

        Context parallelism: one all-gather of keys and values forward, one reduce-scatter backward.
        """
        group = parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        both = torch.stack([key, value], dim=1)
        both = tensor_parallel.gather_from_sequence_parallel_region(both, group=group)
        key, value = both[gathered_positions(cu_seqlens, size)].unbind(1)
        outputs, done = [], 0
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            chunk = (end - start) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                rows, seen = slice(done, done + chunk), slice(start, start + (number + 1) * chunk)
                outputs.append(self._attend(query[None, rows], key[None, seen], value[None, seen])[0])
                done += chunk
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally, [documents, length, heads, d]; the last query attends to all keys."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mask, (length, keys) = None, (query.shape[2], key.shape[2])
        if length < keys and query.is_cuda:
            from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo

            mask = causal_lower_right(length, keys)  # the flash kernel needs no mask in memory
        elif length < keys:
            mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
        options: Any = {"scale": self.scale, "enable_gqa": query.shape[1] != key.shape[1]}
        output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **options)
        return output.transpose(1, 2)
