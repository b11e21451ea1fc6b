"""Qwen3 with experts."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from megatron_srpo.model.families.llama import LAYER, Decoder
from megatron_srpo.model.families.qwen3 import Qwen3
from megatron_srpo.model.mapping import TensorMapping


class Qwen3Moe(Qwen3, model_type="qwen3_moe"):
    """Qwen3 with experts in every layer, routed as in transformers; no token is dropped."""

    has_experts = True
    only: ClassVar[dict[str, Any]] = Qwen3.only | {"mlp_only_layers": [], "decoder_sparse_step": 1}
    defaults: ClassVar[dict[str, Any]] = Decoder.defaults | {"norm_topk_prob": False}

    @classmethod
    @override
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        values.setdefault("num_experts", values.get("num_local_experts"))  # transformers 5 writes this name
        return super().complete(values)

    @override
    def transformer_settings(self) -> dict[str, Any]:
        return super().transformer_settings() | dict(
            num_moe_experts=self.num_experts,
            moe_router_topk=self.num_experts_per_tok,
            moe_ffn_hidden_size=self.moe_intermediate_size,
            # A softmax over all experts, renormalised over the chosen ones, is a softmax over these.
            moe_router_pre_softmax=not self.norm_topk_prob,
            moe_router_load_balancing_type="none",
        )

    @override
    def feed_forward(self) -> Iterator[TensorMapping]:
        router = {LAYER + "mlp.gate.weight": (self.num_experts, self.hidden_size)}
        yield TensorMapping("mlp.router.weight", router)
        yield from self.gated("mlp.experts.", LAYER + "mlp.experts.{expert}.", self.moe_intermediate_size)

    @override
    def stored_tensors(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        # transformers 5 keeps all experts of a layer in two parameters; folders store them one by one
        prefix, _, fused = name.rpartition(".experts.")
        if fused == "gate_up_proj":  # [experts, 2 · width, hidden]
            for expert, both in enumerate(parameter):
                gate, up = both.chunk(2)
                yield f"{prefix}.experts.{expert}.gate_proj.weight", gate
                yield f"{prefix}.experts.{expert}.up_proj.weight", up
        elif fused == "down_proj":  # [experts, hidden, width]
            for expert, down in enumerate(parameter):
                yield f"{prefix}.experts.{expert}.down_proj.weight", down
        else:
            yield name, parameter
