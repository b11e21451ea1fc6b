"""Student–teacher divergences, one module each in this folder, named after algorithm.divergence.

p is the student, q the teacher, both normalised over the full vocabulary. Every divergence here has the
gradient

    dD/dz_v = p_v (f_v - Σ_u p_u f_u)

with respect to the student's logits z, where f is its log-ratio (docs/method.md, section 2). Constants in f
cancel; each f is written so that it is exactly 0 where p = q.

This module does not import torch, because the configuration's schema reads the names.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def names() -> tuple[str, ...]:
    """Return the names of all divergences."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


@cache
def formula(name: str) -> Formula:
    """Return the `FORMULA` of the module `name`."""
    return importlib.import_module(f"{__name__}.{name}").FORMULA


class CpuBlock(NamedTuple):
    """A few rows of one tile that fit in cache, [n, width] each, for `Formula.on_cpu`.

    log p = x - shift_p and log q = y - shift_q, with difference = shift_p - shift_q; p = scale · exp x.
    """

    x: Tensor  # the student's logits minus their maximum; replaced by p·f / Formula.pf_weight
    y: Tensor  # the teacher's logits minus their maximum; replaced by p
    q: Tensor
    scratch: tuple[Tensor, Tensor]
    scale: Tensor  # [n, 1]
    difference: Tensor  # [n, 1]
    teacher_sum: Tensor  # [n], zeros; receives the teacher's sum


class Formula:
    """A divergence D with its log-ratio f.

    Only `terms` is required. The other methods add a faster form for the full vocabulary: `on_cpu` computes
    the student's sum Σ p·f / pf_weight and a sum of the teacher's, and `value` computes D from the two. The
    Triton form is in kernels/triton_ops.py. Without a fast form the reference kernel is used.

    Attributes:
        mean_is_zero: Σ p f is 0 because p f = p - q. It is not computed, to avoid rounding errors.
        has_cpu_form: `on_cpu` is implemented.
    """

    mean_is_zero = False
    has_cpu_form = False

    def terms(self, p: Tensor, q: Tensor, difference: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Return each column's term of D and its p·f; `difference` is log q - log p, 0 where p = q = 0."""
        raise NotImplementedError

    def on_cpu(self, block: CpuBlock, alpha: float) -> None:
        """Overwrite x and y and fill teacher_sum, as documented in `CpuBlock`."""
        raise NotImplementedError

    def pf_weight(self, alpha: float) -> float:
        """Return the constant factor of f that the fast forms omit."""
        return 1.0

    def value(self, student_sum: Tensor, teacher_sum: Tensor, alpha: float) -> Tensor:
        """Return D from the two sums over all columns."""
        raise NotImplementedError
