"""Mistral without a sliding window, that is from version 0.2 on."""

from typing import Any, ClassVar

from typing_extensions import override

from megatron_srpo.model.architecture import UnsupportedModel
from megatron_srpo.model.families.llama import Decoder

_WINDOW = 4096  # transformers' default if config.json has no sliding_window


class Mistral(Decoder, model_type="mistral"):
    """Llama with a sliding window, which must cover all positions here."""

    only: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    defaults: ClassVar[dict[str, Any]] = Decoder.defaults | {"num_key_value_heads": 8}

    @classmethod
    @override
    def check_config(cls, config: dict[str, Any]) -> None:
        super().check_config(config)
        window, positions = config.get("sliding_window", _WINDOW), config.get("max_position_embeddings")
        if window is None or (isinstance(window, int) and isinstance(positions, int) and window >= positions):
            return
        only = "only a window over all positions, or null, is supported"
        raise UnsupportedModel(f"sliding_window is {window!r}, max_position_embeddings {positions!r}; {only}")
