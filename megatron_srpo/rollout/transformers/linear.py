"""Matrix products of fp32 models on a CPU by oneDNN, where BLAS is slower.

torch multiplies fp32 matrices by MKL, which uses AVX2 on AMD's processors. On one core of an EPYC (Zen 5,
2026-11-29), oneDNN takes 0.5 of its time for 128 rows and 2048 × 1024 weights. Converting inputs and outputs
takes about 25 µs, and the weights are copied once after an update. Other processors have not been measured.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_WORTH = 2**22  # multiplications from which converting takes less time than oneDNN saves


def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True for models whose matrix products torch computes by BLAS."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def use_onednn(model: nn.Module) -> None:
    """Replace the linear layers of `model`; parameters and their names stay the same."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, OneDNNLinear(child))


def discard_copies(model: nn.Module) -> None:
    """Discard oneDNN's copies of weights that are about to change."""
    for module in model.modules():
        if isinstance(module, OneDNNLinear):
            module.copies = None


class OneDNNLinear(nn.Module):
    """A linear layer that copies its weights for oneDNN when it first has enough rows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.copies: tuple[Tensor, Tensor | None] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs [..., in] · weightᵀ + bias."""
        rows = inputs.numel() // inputs.shape[-1]
        if rows * self.weight.numel() < _WORTH:
            return linear(inputs, self.weight, self.bias)
        if self.copies is None:
            bias = None if self.bias is None else self.bias.detach().to_mkldnn()
            self.copies = self.weight.detach().to_mkldnn(), bias
        return linear(inputs.to_mkldnn(), *self.copies).to_dense()
