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
    """A part of one tile that fits in cache, for `Formula.on_cpu`; [n, columns] where not noted otherwise.

    log q - log p = y - x + difference.
    """

    p: Tensor
    q: Tensor
    x: Tensor  # the student's logits minus their maximum; may be overwritten
    y: Tensor  # the teacher's logits minus their maximum; may be overwritten
    difference: Tensor  # [n, 1]
    negative_pf: Tensor  # receives -p·f / Formula.pf_weight
    teacher_sum: Tensor  # [n], zeros; receives the teacher's sum

    def log_ratio(self) -> Tensor:
        """Compute log q - log p in the memory of y."""
        return self.y.sub_(self.x).add_(self.difference)


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
        """Fill negative_pf and teacher_sum, as documented in `CpuBlock`."""
        raise NotImplementedError

    def pf_weight(self, alpha: float) -> float:
        """Return the constant factor of f that the fast forms omit."""
        return 1.0

    def value(self, student_sum: Tensor, teacher_sum: Tensor, alpha: float) -> Tensor:
        """Return D from the two sums over all columns."""
        raise NotImplementedError
