"""A divergence is one file of `vocab_parallel/divergences`."""

import pytest
import torch

from megatron_srpo.algorithm.methods.srpo import SRPO
from megatron_srpo.vocab_parallel import divergences
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import fused_objective
from megatron_srpo.vocab_parallel.logits import Logits
from megatron_srpo.vocab_parallel.shard import VocabShard

# squared Hellinger distance 1 - Σ √(p q), whose f is -½ √(q/p)
HELLINGER = """
from megatron_srpo.vocab_parallel.divergences import Formula

class Hellinger(Formula):
    def terms(self, p, q, difference, alpha):
        overlap = (p * q).sqrt()
        return p - overlap, -overlap / 2

FORMULA = Hellinger()
"""
WIDTH, TOKENS = 37, 9


@pytest.fixture
def hellinger(tmp_path, monkeypatch):
    (tmp_path / "hellinger.py").write_text(HELLINGER)
    monkeypatch.setattr(divergences, "__path__", [*divergences.__path__, str(tmp_path)])


@pytest.mark.parametrize("support, top_k", [("full", 1), ("student_topk", WIDTH - 1)])
def test_one_file_adds_a_divergence(hellinger, support, top_k):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (2 * torch.randn(2, TOKENS, WIDTH, generator=generator)).double()
    student.requires_grad_()
    targets = torch.arange(TOKENS)
    loss = fused_objective(
        Logits(student),
        targets,
        lambda rows, tile: tile.divergence.sum(),
        VocabShard(0, WIDTH, WIDTH),
        teacher=Logits(teacher),
        divergence=Divergence("hellinger", support=support, top_k=top_k),
    )[0]
    (found,) = torch.autograd.grad(loss, student)
    expected = TOKENS - (student.softmax(1) * teacher.softmax(1)).sqrt().sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, student)[0])


def test_the_configuration_knows_the_divergences_by_their_files():
    assert set(divergences.names()) == {"forward", "jsd", "reverse"}
    with pytest.raises(ValueError, match="'forward', 'jsd' or 'reverse'"):
        SRPO(divergence="hellinger")
