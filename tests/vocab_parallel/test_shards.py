"""Three processes, each with its part of the vocabulary, against the unsharded float64 result.

One launch for all cases.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_srpo.vocab_parallel import fused
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import fused_objective, score
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

sys.path.insert(0, str(Path(__file__).parent))  # the spawned processes find their neighbours too
from test_fused import Problem, assert_close  # noqa: E402

RANKS = 3
VOCABULARY = 29
# padded rows a rank: shards of 10, 10, 9 columns; of 15, 14, 0; of 29, 0, 0
PADDED_WIDTHS = (10, 15, 29)
KINDS = [
    Divergence(kind, alpha, *support)
    for (kind, alpha), support in itertools.product(
        [("jsd", 0.5), ("jsd", 0.2), ("forward", 0.5), ("reverse", 0.5)],
        [
            ("full",),
            ("student_topk", 6),
            ("student_topk", 28),
            ("student_topk", 29),
            ("teacher_topk", 6),
            ("teacher_topk", 28),
        ],
    )
]
KINDS.append(Divergence("reverse", support="sampled"))


def problem_of(padded_width: int, distilled: int = 5) -> Problem:
    return Problem(13, distilled, VOCABULARY, RANKS * padded_width)


def run_rank(rank: int, store: str, results: str) -> None:
    """What one process does: every case on its shard; rank 0 saves the gathered results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    saved = {}
    for padded_width in PADDED_WIDTHS:
        shard = VocabShard.of_rank(rank, padded_width, VOCABULARY, dist.group.WORLD)
        for kind in KINDS:
            for distilled in (5, 0) if kind == KINDS[0] else (5,):
                case = problem_of(padded_width, distilled), kind, shard, padded_width, rank
                saved[padded_width, kind, distilled] = _case(*case)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        fused,
                        "_kernel",
                        lambda tile_tokens, shard, divergence, own: ReferenceKernel(shard, divergence),
                    )
                    torch.testing.assert_close(_case(*case), saved[padded_width, kind, distilled])
        problem = problem_of(padded_width)
        own = slice(rank * padded_width, (rank + 1) * padded_width)
        source = Projection(problem.hidden, problem.weight[own])
        saved[padded_width, "score"] = tuple(score(source, problem.targets, shard, temperature=0.7))
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, saved)
    if rank == 0:
        torch.save(gathered, results)
    dist.destroy_process_group()


def _case(problem: Problem, kind: Divergence, shard: VocabShard, padded_width: int, rank: int):
    own = slice(rank * padded_width, (rank + 1) * padded_width)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight[own].clone().requires_grad_()
    loss, statistics = fused_objective(
        Projection(hidden, weight),
        problem.targets,
        problem.objective,
        shard,
        teacher=Projection(problem.teacher_hidden, problem.teacher_weight[own])
        if problem.distilled
        else None,
        divergence=kind,
        temperature=0.7,
        tile_tokens=4,
    )
    loss.backward()
    dist.all_reduce(hidden.grad)  # each rank has its share
    return (loss.detach(), hidden.grad, weight.grad), tuple(statistics)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Every rank's results of every case."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(run_rank, (str(folder / "store"), str(folder / "results")), nprocs=RANKS)
    with torch.serialization.safe_globals([Divergence]):
        return torch.load(folder / "results", weights_only=True)


@pytest.mark.parametrize("padded_width", PADDED_WIDTHS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shards_agree_with_the_whole(of_ranks, kind, padded_width):
    cases = [results[padded_width, kind, 5] for results in of_ranks]
    (loss, hidden_grad, _), statistics = cases[0]
    weight_grad = torch.cat([gradients[2] for gradients, _ in cases])
    expected = problem_of(padded_width).exact(kind, temperature=0.7)
    assert_close(((loss, hidden_grad, weight_grad), statistics), expected, 1e-11)


@pytest.mark.parametrize("padded_width", PADDED_WIDTHS)
def test_shards_without_distilled_tokens(of_ranks, padded_width):
    cases = [results[padded_width, KINDS[0], 0] for results in of_ranks]
    weight_grad = torch.cat([gradients[2] for gradients, _ in cases])
    expected = problem_of(padded_width, 0).exact(temperature=0.7)
    assert_close(((*cases[0][0][:2], weight_grad), cases[0][1]), expected, 1e-11)


def test_loss_and_statistics_are_the_same_on_every_rank(of_ranks):
    for case, (gradients, statistics) in (
        (key, value) for key, value in of_ranks[0].items() if key[1] != "score"
    ):
        for other in of_ranks[1:]:
            assert torch.equal(gradients[0], other[case][0][0])
            assert all(torch.equal(x, y) for x, y in zip(statistics, other[case][1], strict=True))


@pytest.mark.parametrize("padded_width", PADDED_WIDTHS)
def test_score_on_shards(of_ranks, padded_width):
    logprob, entropy, _ = problem_of(padded_width).exact(temperature=0.7)[1]
    for results in of_ranks:
        torch.testing.assert_close(results[padded_width, "score"][0], logprob)
        torch.testing.assert_close(results[padded_width, "score"][1], entropy)
