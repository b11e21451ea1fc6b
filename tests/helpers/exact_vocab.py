"""Compute log-probs, entropies and divergences by float64 autograd over complete logits.

There are no tiles or shards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence

WIDE = torch.float64


def log_softmax(hidden: Tensor, weight: Tensor, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Return [T, V] log-probs, without the padded rows of `weight`."""
    return torch.log_softmax(hidden @ weight[:vocab_size].t() / temperature, dim=-1)


def divergence(logp: Tensor, logq: Tensor, divergence: Divergence, targets: Tensor | None = None) -> Tensor:
    """Return D [T] between student and teacher; gradients flow into both.

    On the sampled token: the SDPO code's stopgrad(log p - log q) · log p, moved by a constant to the value
    log p - log q.
    """
    if divergence.support == "sampled":
        logp_y, logq_y = logp.gather(1, targets[:, None])[:, 0], logq.gather(1, targets[:, None])[:, 0]
        ratio = (logp_y - logq_y).detach()
        return ratio * logp_y + (ratio - ratio * logp_y).detach()
    if divergence.support.endswith("topk") and divergence.top_k < logp.shape[1]:
        chooser = logp if divergence.support == "student_topk" else logq
        head = chooser.detach().argsort(dim=1, descending=True)[:, : divergence.top_k]
        logp, logq = _with_tail(logp, head), _with_tail(logq, head)
    p, q, alpha = logp.exp(), logq.exp(), divergence.alpha
    if divergence.name == "forward":
        return (q * (logq - logp)).sum(1)
    if divergence.name == "reverse":
        return (p * (logp - logq)).sum(1)
    logm = torch.stack([logp + math.log(1 - alpha), logq + math.log(alpha)]).logsumexp(0)
    return (1 - alpha) * (p * (logp - logm)).sum(1) + alpha * (q * (logq - logm)).sum(1)


def _with_tail(logs: Tensor, head: Tensor) -> Tensor:
    in_tail = torch.ones_like(logs).scatter(1, head, 0).bool()
    tail = logs.masked_fill(~in_tail, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([logs.gather(1, head), tail], dim=1)


def entropy(logp: Tensor) -> Tensor:
    """Return H [T] in nats."""
    return -(logp.exp() * logp).sum(1)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected entry."""
    if expected.numel() == 0:
        return 0.0
    return ((found.to(WIDE) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def norm_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected norm."""
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((found.to(WIDE) - expected).norm() / expected.norm().clamp(min=1e-300)).item()
