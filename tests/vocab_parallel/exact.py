"""The same quantities by float64 autograd over whole logits: nothing tiled, sharded or in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence

WIDE = torch.float64


def log_softmax(hidden: Tensor, weight: Tensor, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """[T, V] log-probabilities, without the padded rows of `weight`."""
    return torch.log_softmax(hidden @ weight[:vocab_size].t() / temperature, dim=-1)


def divergence(logp: Tensor, logq: Tensor, kind: Divergence, targets: Tensor | None = None) -> Tensor:
    """D [T] between student and teacher, on the support that `kind` names; gradients flow into both.

    On the sampled token: the SDPO code's stopgrad(log p - log q) · log p, moved by a constant to the value
    log p - log q.
    """
    vocab_size = logp.shape[1]
    if kind.support == "sampled":
        chosen, of_teacher = (x.gather(1, targets[:, None])[:, 0] for x in (logp, logq))
        ratio = (chosen - of_teacher).detach()
        return ratio * chosen + (ratio - ratio * chosen).detach()
    if kind.support.endswith("topk") and kind.top_k < vocab_size:
        chooses = logp if kind.support == "student_topk" else logq
        head = chooses.detach().argsort(dim=1, descending=True)[:, : kind.top_k]
        outside = torch.ones_like(logp).scatter(1, head, 0).bool()
        logp, logq = (
            torch.cat(
                [x.gather(1, head), x.masked_fill(~outside, -math.inf).logsumexp(1, keepdim=True)], dim=1
            )
            for x in (logp, logq)
        )
    p, q = logp.exp(), logq.exp()
    if kind.name == "forward":
        return (q * (logq - logp)).sum(1)
    if kind.name == "reverse":
        return (p * (logp - logq)).sum(1)
    logm = torch.stack([logp + math.log(1 - kind.alpha), logq + math.log(kind.alpha)]).logsumexp(0)
    return (1 - kind.alpha) * (p * (logp - logm)).sum(1) + kind.alpha * (q * (logq - logm)).sum(1)


def entropy(logp: Tensor) -> Tensor:
    """H [T] in nats."""
    return -(logp.exp() * logp).sum(1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry."""
    if expected.numel() == 0:
        return 0.0
    return ((found.to(WIDE) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
