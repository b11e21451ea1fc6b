"""The one table HF ↔ Megatron, for every architecture: a model has the mappings whose parameters it has.

Each mapping maps one Megatron parameter to the HF tensors it is made of. Every HF tensor is sharded over
tensor-parallel ranks by contiguous slices along one dimension; a rank's parameter is then a local arrangement
of its own slices. So both directions, at any TP, are: slice ↔ concatenate, and `merge` ↔ `split`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_srpo.model.hf_folder import Architecture

Split = Callable[[Tensor, Architecture], list[Tensor]]
Merge = Callable[[Sequence[Tensor], Architecture], Tensor]


VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")  # padded at their end in Megatron


@dataclass(frozen=True)
class TensorMapping:
    """megatron: parameter name inside its layer (or model, or expert); hf: tensor names inside theirs; dim:
    sharded dimension or None.

    expert: whether it belongs to one expert, and is sharded over expert-tensor-parallel ranks.
    """

    megatron: str
    hf: tuple[str, ...]
    dim: int | None = None
    merge: Merge = lambda pieces, architecture: pieces[0]
    split: Split = lambda tensor, architecture: [tensor]
    expert: bool = False

    def cut(
        self, tensors: Sequence, part: int, parts: int, shape: Sequence[int], architecture: Architecture
    ) -> Tensor:
        """The parameter, of `shape`, of tensor-parallel part `part` of `parts`.

        tensors: the mapping's whole HF tensors, or safetensors' slices of them, of which only this part is read.
        """
        pieces = []
        for tensor in tensors:
            if self.dim is None:
                pieces.append(tensor[:])
                continue
            size = (tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)[self.dim]
            width = shape[0] if self.hf[0] in VOCABULARY_TENSORS else size // parts
            span = slice(min(part * width, size), min((part + 1) * width, size))
            pieces.append(tensor[span] if self.dim == 0 else tensor[:, span])
        merged = self.merge(pieces, architecture)
        if len(merged) < shape[0]:  # the vocabulary's padding
            merged = torch.cat([merged, merged.new_zeros(shape[0] - len(merged), *shape[1:])])
        return merged

    def join(self, parts: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The mapping's whole HF tensors from the parameters of all tensor-parallel parts: the inverse of `cut`."""
        pieces = zip(*(self.split(part, architecture) for part in parts), strict=True)
        whole = [torch.cat(same, dim=self.dim) if len(same) > 1 else same[0] for same in pieces]
        return [whole[0][: architecture.vocab_size]] if self.hf[0] in VOCABULARY_TENSORS else whole


def _merge_qkv(pieces: Sequence[Tensor], a: Architecture) -> Tensor:
    """Megatron keeps the heads of one query group together: its queries, its key, its value.

    Weights [n, H] and biases [n] alike.
    """
    groups, inner = pieces[1].shape[0] // a.head_dim, pieces[1].shape[1:]
    return torch.cat([piece.view(groups, -1, *inner) for piece in pieces], dim=1).reshape(-1, *inner)


def _split_qkv(tensor: Tensor, a: Architecture) -> list[Tensor]:
    queries = a.num_attention_heads // a.num_key_value_heads * a.head_dim
    inner = tensor.shape[1:]
    grouped = tensor.view(-1, queries + 2 * a.head_dim, *inner)
    return [part.reshape(-1, *inner) for part in grouped.split([queries, a.head_dim, a.head_dim], dim=1)]


def _gate_up(prefix: str, expert: bool) -> TensorMapping:
    names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
    merge, split = (
        lambda pieces, architecture: torch.cat(list(pieces)),
        lambda tensor, architecture: list(tensor.chunk(2)),
    )
    return TensorMapping(f"{prefix}linear_fc1.weight", names, 0, merge, split, expert)


def _down(prefix: str, expert: bool) -> TensorMapping:
    return TensorMapping(f"{prefix}linear_fc2.weight", (f"{prefix}down_proj.weight",), 1, expert=expert)


LAYER_MAPPINGS = (
    TensorMapping("input_layernorm.weight", ("input_layernorm.weight",)),
    TensorMapping(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        0,
        _merge_qkv,
        _split_qkv,
    ),
    TensorMapping(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        0,
        _merge_qkv,
        _split_qkv,
    ),
    TensorMapping("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    TensorMapping("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
    TensorMapping("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), 1),
    TensorMapping("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    _gate_up("mlp.", expert=False),
    _down("mlp.", expert=False),
    TensorMapping("mlp.router.weight", ("mlp.gate.weight",)),
)
EXPERT_MAPPINGS = (_gate_up("", expert=True), _down("", expert=True))
MODEL_MAPPINGS = (
    TensorMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0),
    TensorMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorMapping("output_layer.weight", ("lm_head.weight",), 0),
)

# Transformer Engine fuses a norm into the matrix product after it, and names its weight there.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_BY_NAME = {mapping.megatron: mapping for mapping in LAYER_MAPPINGS + EXPERT_MAPPINGS + MODEL_MAPPINGS}
# Local layers keep a module for each expert, Transformer Engine all experts' matrices in one, numbered at
# their end.
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12]\.weight)(\d*)")


def find_mapping(name: str, layer_offset: int, expert_offset: int = 0) -> tuple[TensorMapping, str]:
    """The mapping of a chunk's parameter and the prefix of its HF names.

    Args:
        name: as in `named_parameters()` of the chunk, layers counted from the chunk's first.
        layer_offset: the chunk's first layer in the whole model.
        expert_offset: the rank's first expert among all.

    Raises KeyError for a parameter the table does not know.
    """
    if not name.startswith("decoder.layers."):
        return _BY_NAME[name], ""
    layer, inner = name.removeprefix("decoder.layers.").split(".", 1)
    prefix = f"model.layers.{int(layer) + layer_offset}."
    if match := _EXPERT.fullmatch(inner):
        module, inner, number = match.groups()
        prefix += f"mlp.experts.{int(module or number) + expert_offset}."
    return _BY_NAME[_FUSED_NORMS.get(inner, inner)], prefix


def fused_name(mapping: TensorMapping, dense: bool) -> str:
    """The mapping's parameter as Transformer Engine names it; it fuses the norm before the feed-forward in dense
    layers only.
    """
    for fused, name in _FUSED_NORMS.items():
        if name == mapping.megatron and (dense or name != "pre_mlp_layernorm.weight"):
            return fused
    return mapping.megatron
