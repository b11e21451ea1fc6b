"""Llama 2 and 3, and the decoder on which the other families are based."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch.nn.functional import silu
from typing_extensions import override

from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.mapping import QueryGroups, Stacked, TensorMapping

LAYER = "model.layers.{layer}."
_EMBEDDING = "model.embed_tokens.weight"


class Decoder(Architecture):
    """Grouped-query attention and a gated feed-forward network, with an RMSNorm before each."""

    @override
    def transformer_settings(self) -> dict[str, Any]:
        return dict(
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_key_value_heads,
            kv_channels=self.head_dim,
            layernorm_epsilon=self.rms_norm_eps,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=silu,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            qk_layernorm=self.qk_norm,
        )

    @override
    def table(self) -> Iterator[TensorMapping]:
        hidden, matrix = self.hidden_size, (self.vocab_size, self.hidden_size)
        tied_to = _EMBEDDING if self.tie_word_embeddings else None
        yield TensorMapping("embedding.word_embeddings.weight", {_EMBEDDING: matrix}, dim=0, padded=True)
        yield TensorMapping("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)})
        head = {"lm_head.weight": matrix}
        yield TensorMapping("output_layer.weight", head, dim=0, padded=True, tied_to=tied_to)
        yield TensorMapping("input_layernorm.weight", {LAYER + "input_layernorm.weight": (hidden,)})
        mlp_norm = {LAYER + "post_attention_layernorm.weight": (hidden,)}
        yield TensorMapping("pre_mlp_layernorm.weight", mlp_norm)
        yield from self.attention()
        yield from self.feed_forward()

    def attention(self) -> Iterator[TensorMapping]:
        """Yield the mappings of a layer's attention."""
        hidden, head, prefix = self.hidden_size, self.head_dim, LAYER + "self_attn."
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        groups = QueryGroups(self.num_attention_heads // self.num_key_value_heads, head)
        weights = {f"{prefix}{name}.weight": (size, hidden) for name, size in rows.items()}
        yield TensorMapping("self_attention.linear_qkv.weight", weights, dim=0, fusion=groups)
        output = {prefix + "o_proj.weight": (hidden, queries)}
        yield TensorMapping("self_attention.linear_proj.weight", output, dim=1)
        if self.qk_norm:
            yield TensorMapping("self_attention.q_layernorm.weight", {prefix + "q_norm.weight": (head,)})
            yield TensorMapping("self_attention.k_layernorm.weight", {prefix + "k_norm.weight": (head,)})
        if self.qkv_bias:
            biases = {f"{prefix}{name}.bias": (size,) for name, size in rows.items()}
            yield TensorMapping("self_attention.linear_qkv.bias", biases, dim=0, fusion=groups)

    def feed_forward(self) -> Iterator[TensorMapping]:
        """Yield the mappings of a layer's feed-forward network."""
        return self.gated("mlp.", LAYER + "mlp.", self.intermediate_size)

    def gated(self, megatron: str, prefix: str, width: int) -> Iterator[TensorMapping]:
        """Yield the mappings of a gated feed-forward network of `width`, given both name prefixes."""
        into, out = (width, self.hidden_size), (self.hidden_size, width)
        both = {prefix + "gate_proj.weight": into, prefix + "up_proj.weight": into}
        yield TensorMapping(megatron + "linear_fc1.weight", both, dim=0, fusion=Stacked(2))
        yield TensorMapping(megatron + "linear_fc2.weight", {prefix + "down_proj.weight": out}, dim=1)


class Llama(Decoder, model_type="llama"):
    """Llama; num_key_value_heads defaults to num_attention_heads."""

    only: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

    @classmethod
    @override
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        return super().complete(values)
