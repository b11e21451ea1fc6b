"""Compute the complete routed training step a second time, independently.

It is plain float64 torch and autograd on the Hugging Face model.

Knows nothing of shards, tiles, packing or closed forms. Reads the samples' routes (tested on their own) from
a run's dumped rollouts; everything numeric is computed here from METHOD's equations, sample by sample.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from samples import sample_rows
from transformers import AutoModelForCausalLM


def logps(model, prompt, response):
    """Return the log softmax over the vocabulary at the positions that predict the response, [R, V]."""
    ids = torch.tensor([*prompt, *response])
    return model(ids[None]).logits[0, len(prompt) - 1 : len(ids) - 1].log_softmax(-1)


def _divergence(logp, logq, response, kind, alpha, support, top_k):
    if support == "sampled":  # the SDPO code's score-function form, moved to the value log p - log q
        chosen, of_teacher = (x.gather(1, torch.tensor(response)[:, None])[:, 0] for x in (logp, logq))
        ratio = (chosen - of_teacher).detach()
        return ratio * (chosen - chosen.detach()) + ratio
    if support != "full":
        ids = (logp.detach() if support == "student_topk" else logq).topk(top_k, dim=-1).indices

        def buckets(x):
            head = x.gather(1, ids)
            inside = torch.zeros_like(x, dtype=torch.bool).scatter(1, ids, True)
            return torch.cat([head, x.masked_fill(inside, -math.inf).logsumexp(1, keepdim=True)], dim=1)

        logp, logq = buckets(logp), buckets(logq)
    p, q = logp.exp(), logq.exp()
    if kind == "forward":
        return (q * (logq - logp)).sum(1)
    if kind == "reverse":
        return (p * (logp - logq)).sum(1)
    logm = ((1 - alpha) * p + alpha * q).log()
    return (1 - alpha) * (p * (logp - logm)).sum(1) + alpha * (q * (logq - logm)).sum(1)


class Reference:
    """Train the HF model in float64 with AdamW and the routed loss; see `run`."""

    def __init__(
        self,
        hf_path: Path,
        lr: float,
        warmup: int,
        beta: float,
        kind="jsd",
        alpha=0.5,
        support="full",
        top_k=None,
        aggregation="token_mean",
        trust_region=None,
        weight_decay=0.01,
    ):
        eager = dict(attn_implementation="eager", experts_implementation="eager")
        self.model = AutoModelForCausalLM.from_pretrained(hf_path, dtype=torch.float64, **eager)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        vectors = [p for p in self.model.parameters() if p.ndim == 1]  # norms and biases
        others = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
        self.lr, self.warmup, self.beta = lr, warmup, beta
        self.divergence = (kind, alpha, support, top_k)
        self.aggregation, self.trust_region = aggregation, trust_region
        self.steps = 0
        self.gradients: dict[str, torch.Tensor] = {}

    def loss(self, samples, old=None):
        """Return the routed loss of one optimizer batch.

        old: log π_old by sample, or None for the current policy.
        """
        samples = [s for s in samples if s["route"]["policy_weight"] or s["route"]["distillation_weight"]]
        teacher = [self._teacher_logps(s) if s["route"]["distillation_weight"] else None for s in samples]
        raw = [torch.exp(self.beta * (q.exp() * q).sum(1)) for q in teacher if q is not None]  # exp(-β H)
        mean = torch.cat(raw).mean() if raw else 1.0
        lengths = [len(s["policy_ids"]) for s in samples]
        total = 0.0
        for s, logq in zip(samples, teacher, strict=True):
            logp = logps(self.model, s["prompt"]["ids"], s["response_ids"])[s["loss_mask"]]
            chosen = logp.gather(1, torch.tensor(s["policy_ids"])[:, None])[:, 0]
            before = chosen.detach() if old is None else old[s["prompt"]["id"], s["index"]]
            rho = (before - torch.tensor(s["logprobs"], dtype=torch.float64)).exp().clamp(max=2)
            w, a = (chosen - before).exp(), s["route"]["advantage"]
            policy = -torch.minimum(w * a, w.clamp(0.8, 1.28) * a)
            if a < 0:
                policy = policy.clamp(max=-3 * a)
            term = s["route"]["policy_weight"] * rho * policy
            if logq is not None:
                weight = torch.exp(self.beta * (logq.exp() * logq).sum(1)) / mean
                divergence = _divergence(logp, logq, s["policy_ids"], *self.divergence)
                term = (
                    term
                    + s["route"]["distillation_weight"] * weight * rho * w.detach().clamp(max=2) * divergence
                )
            total = total + (
                term.sum() / sum(lengths) if self.aggregation == "token_mean" else term.mean() / len(samples)
            )
        return total

    @torch.no_grad()
    def _teacher_logps(self, s):
        prompt, response, mask = s["route"]["teacher_ids"], s["response_ids"], s["loss_mask"]
        logq = logps(self.teacher, prompt, response)[mask]
        if self.trust_region is None:
            return logq
        logp = logps(self.model, prompt, response)[
            mask
        ]  # logits but for a constant a row, which the softmax drops
        return ((1 - self.trust_region) * logq + self.trust_region * logp).log_softmax(-1)

    def run(self, step_file: Path, mini_batches: int = 1):
        """Train one step from a dumped file; return (mean loss, mean gradient norm) over its updates.

        The gradient norm is the one before clipping.
        """
        samples = sample_rows(step_file)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / self.warmup) if self.warmup else self.lr
        old = None
        if mini_batches > 1:
            with torch.no_grad():
                old = {
                    (s["prompt"]["id"], s["index"]): logps(self.model, s["prompt"]["ids"], s["response_ids"])[
                        s["loss_mask"]
                    ].gather(1, torch.tensor(s["policy_ids"])[:, None])[:, 0]
                    for s in samples
                }
        size, losses, norms = len(samples) // mini_batches, [], []
        for start in range(0, len(samples), size):
            self.optimizer.zero_grad()
            loss = self.loss(samples[start : start + size], old)
            if torch.is_tensor(loss) and loss.requires_grad:
                loss.backward()
            for parameter in self.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
            losses.append(float(loss))
            self.optimizer.step()
        with torch.no_grad():
            for slow, fast in (
                []
                if self.trust_region
                else zip(self.teacher.parameters(), self.model.parameters(), strict=True)
            ):
                slow.lerp_(fast, 0.05)
        return sum(losses) / len(losses), sum(norms) / len(norms)
