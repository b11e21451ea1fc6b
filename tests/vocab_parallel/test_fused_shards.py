"""Test three processes, each with its part of the vocabulary, against unsharded float64.

There is one launch for all cases.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairwise import combinations
from vocab_inputs import FULL, KERNELS, SAMPLED, FusedCase, assert_close

from megatron_srpo.vocab_parallel.fused import score
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.vocab_parallel.shard import VocabShard
from megatron_srpo.vocab_parallel.top_tokens import top_tokens

RANKS = 3
VOCABULARY = 29
# padded rows a rank: shards of 10, 10, 9 columns; of 15, 14, 0; of 29, 0, 0
PADDED_WIDTHS = (10, 15, 29)
SUPPORTS = [
    ("full", 100),
    ("student_topk", 6),
    ("student_topk", 28),
    ("student_topk", 29),
    ("teacher_topk", 6),
    ("teacher_topk", 28),
]
DIVERGENCES = [FULL[1], FULL[3], FULL[4]]
# padded width, divergence, support, kernel, distilled tokens
CASES = [
    *combinations(PADDED_WIDTHS, DIVERGENCES, SUPPORTS, KERNELS, [5]),
    *[(width, SAMPLED, ("sampled", 100), "cpu", 5) for width in PADDED_WIDTHS],
    *[(width, FULL[0], ("full", 100), "cpu", 0) for width in PADDED_WIDTHS],
    (PADDED_WIDTHS[0], SAMPLED, ("sampled", 100), "reference", 5),
]


def fused_case(padded_width: int, distilled: int = 5) -> FusedCase:
    return FusedCase(13, distilled, VOCABULARY, RANKS * padded_width)


def run_rank(rank: int, store: str, results: str) -> None:
    """Run every case on this rank's shard; rank 0 saves the gathered results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    saved = {}
    for index, (padded_width, divergence, (support, top_k), kernel, distilled) in enumerate(CASES):
        gradients, statistics = fused_case(padded_width, distilled).fused(
            divergence._replace(support=support, top_k=top_k),
            temperature=0.7,
            rank=rank,
            ranks=RANKS,
            group=dist.group.WORLD,
            tile_tokens=4,
            kernel=kernel,
        )
        dist.all_reduce(gradients[1])  # each rank has its share
        saved[index] = gradients, tuple(statistics)
    for padded_width in PADDED_WIDTHS:
        case, own = fused_case(padded_width), slice(rank * padded_width, (rank + 1) * padded_width)
        source = Projection(case.hidden, case.weight[own])
        shard = VocabShard.of_rank(rank, padded_width, VOCABULARY, dist.group.WORLD)
        saved[padded_width, "score"] = tuple(score(source, case.targets, shard, temperature=0.7))
        saved[padded_width, "top"] = tuple(top_tokens(source, case.targets, shard, 20, temperature=0.7))
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, saved)
    if rank == 0:
        torch.save(gathered, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Return every rank's results of every case."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(run_rank, (str(folder / "store"), str(folder / "results")), nprocs=RANKS)
    return torch.load(folder / "results", weights_only=True)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_shards_agree_with_the_unsharded_result(of_ranks, index):
    padded_width, divergence, (support, top_k), _, distilled = CASES[index]
    results = [saved[index] for saved in of_ranks]
    (loss, hidden_grad, _), statistics = results[0]
    weight_grad = torch.cat([gradients[2] for gradients, _ in results])
    case = fused_case(padded_width, distilled)
    expected = case.exact(divergence._replace(support=support, top_k=top_k), temperature=0.7)
    assert_close(((loss, hidden_grad, weight_grad), statistics), expected, 1e-11)
    for gradients, other_statistics in results[1:]:
        assert torch.equal(loss, gradients[0])
        assert all(torch.equal(x, y) for x, y in zip(statistics, other_statistics, strict=True))


@pytest.mark.parametrize("padded_width", PADDED_WIDTHS)
def test_score_on_shards(of_ranks, padded_width):
    logprob, entropy, _ = fused_case(padded_width).exact(temperature=0.7)[1]
    for results in of_ranks:
        torch.testing.assert_close(results[padded_width, "score"][0], logprob)
        torch.testing.assert_close(results[padded_width, "score"][1], entropy)


@pytest.mark.parametrize("padded_width", PADDED_WIDTHS)
def test_top_tokens_on_shards(of_ranks, padded_width):
    # Twenty ids are more than some shards hold.
    case = fused_case(padded_width)
    logp = torch.log_softmax(case.hidden @ case.weight[:VOCABULARY].t() / 0.7, dim=1)
    expected = logp.topk(20, dim=1)
    for results in of_ranks:
        ids, logprobs, target_logprob = results[padded_width, "top"]
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(logprobs, expected.values)
        torch.testing.assert_close(target_logprob, logp.gather(1, case.targets[:, None])[:, 0])
