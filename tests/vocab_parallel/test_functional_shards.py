"""Test `functional` with the vocabulary on 1, 2 and 4 ranks against unsharded float64.

Errors must reach every rank.
"""

import datetime
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exact_vocab import WIDE, norm_error
from pairwise import combinations
from tables import each_row
from vocab_inputs import DIVERGENCES, ENTROPY, KERNELS, LOG_PROB, SAMPLED_KL, Inputs

from megatron_srpo.vocab_parallel import functional
from megatron_srpo.vocab_parallel.fused import IGNORED, fused_objective
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

RANKS, VOCABULARY, TEMPERATURE = 4, 3001, 0.9
LAYOUTS = [(3001, 0), (800, 800, 800, 601), (1500, 1500, 1, 0), (1000, 700, 0, 1301)]  # columns a rank
BARRED = {  # columns of -inf: all that a rank has in the last layout; all but fewer than K
    "barred": slice(1000, 1700),
    "scarce": slice(60, 3001),
}
FORMS = ("logits", "projection", *BARRED)
JSD, FORWARD, REVERSE = DIVERGENCES[0], DIVERGENCES[3], DIVERGENCES[4]
FUNCTIONS = [
    LOG_PROB,
    ENTROPY,
    SAMPLED_KL,
    JSD,
    JSD.on("student_topk", 100),
    FORWARD.on("teacher_topk", 100),
    REVERSE.on("student_topk", 100),
]
TOLERANCE = {torch.float32: 2e-6, WIDE: 1e-11}
CASES = combinations(FUNCTIONS, FORMS, TOLERANCE, LAYOUTS, KERNELS)
CASES += [(function, "projection", torch.float32, (3001,), "cpu") for function in FUNCTIONS[3:5]]


def unsharded_inputs(form: str, dtype: torch.dtype, impossible: float = -math.inf) -> Inputs:
    """Return eight tokens, two of them ignored, of all columns; barred columns have logits `impossible`."""
    kind = "projection" if form == "projection" else "logits"
    inputs = Inputs(kind, 8, VOCABULARY, VOCABULARY, width=32, dtype=dtype, scale=0.35, interpolation=0.25)
    if form in BARRED:
        for tensor in (*inputs.student, *inputs.teacher_tensors):
            tensor[:, BARRED[form]] = impossible
        inputs.targets %= BARRED[form].start
    inputs.upstream = inputs.upstream.abs()  # its sums are not small compared with their addends
    inputs.ignored = torch.tensor([2, 7])
    return inputs


def columns_of(source, start: int, width: int):
    """Return one rank's columns, and two more that are padding."""
    if isinstance(source, InterpolatedLogits):
        reference, policy = (columns_of(part, start, width) for part in source[:2])
        return InterpolatedLogits(reference, policy, source.interpolation)
    if isinstance(source, Logits):
        own = source.logits[:, start : start + width]
        return Logits(torch.nn.functional.pad(own, (0, 2), value=math.nan))
    own = source.weight[start : start + width]
    return Projection(source.hidden, torch.nn.functional.pad(own, (0, 0, 0, 2), value=math.nan))


def run_case(rank: int, groups: dict, case: tuple):
    """Return this rank's values and gradients without padding; hidden gradients are summed over the ranks."""
    function, form, dtype, widths, kernel = case
    inputs, ranks = unsharded_inputs(form, dtype), len(widths)
    position, targets = rank % ranks, inputs.targets.clone()
    targets[inputs.ignored] = IGNORED
    start, width = sum(widths[:position]), widths[position]
    shard = VocabShard(start, width, VOCABULARY, groups[ranks])
    student, teacher = (columns_of(x, start, width) for x in (inputs.student, inputs.teacher))
    student = type(student)(*(x.clone().requires_grad_() for x in student))
    options = {"temperature": TEMPERATURE, "tile_tokens": 3, "kernel": kernel}
    value = function.ours(student, teacher, targets, shard, **options)
    (value * inputs.upstream.to(value.dtype)).sum().backward()
    if isinstance(student, Logits):
        assert (student.logits.grad[:, width:] == 0).all()
        return value.detach(), [student.logits.grad[:, :width]]
    assert (student.weight.grad[width:] == 0).all()
    dist.all_reduce(student.hidden.grad, group=groups[ranks])
    return value.detach(), [student.hidden.grad, student.weight.grad[:width]]


def on(culprit: int, rank: int, message: str, **changes) -> tuple[dict, str]:
    """Return changes for one rank only; the other ranks' error names it."""
    if rank == culprit:
        return changes, message
    return {}, f"tensor-parallel rank {culprit} has invalid inputs"


def unequal(culprit: int, rank: int, message: str, **changes) -> tuple[dict, str]:
    """Return changes for one rank only, which are wrong because the others' inputs differ."""
    return (changes if rank == culprit else {}), message


def mistakes(rank: int, groups: dict, group) -> dict[str, tuple[dict, str]]:
    """Return wrong calls: this rank's changes of the arguments, and the expected message."""
    x, wide, targets = torch.zeros(6, 5), torch.zeros(6, 11), torch.arange(6)
    reverse = VocabShard.of_rank(3 - rank, 3, 11, group)
    x5 = {"student": x[:5], "teacher": x[:5], "targets": targets[:5]}
    x0 = {"student": x[:0], "teacher": x[:0], "targets": targets[:0]}
    return {
        "target outside everywhere": ({"targets": targets + 6}, "targets: ids from 11 to 11 at 1 positions"),
        "target outside on one": on(2, rank, "targets: ids from -1 to -1", targets=targets - 1),
        "targets of another dtype on one": on(0, rank, "targets.*torch.int32", targets=targets.int()),
        "teacher of another dtype on one": on(
            3, rank, "teacher of 6 tokens .torch.float64", teacher=x.double()
        ),
        "option on one": on(1, rank, "temperature 0.0", temperature=0.0),
        "fewer tokens on one": unequal(1, rank, r"tokens: .*have \[6, 5, 6, 6\]", **x5),
        "fewer distilled on one": unequal(3, rank, r"tokens.*have.* \[\d, \d, \d, 4\]", teacher=x[:4]),
        "no targets on one": on(1, rank, "targets: None", targets=None),
        "no teacher on one": on(2, rank, "teacher: None", teacher=None),
        "no tokens on one": unequal(0, rank, r"tokens: .*have \[0, 6, 6, 6\]", **x0),
        "gap": unequal(1, rank, r"shard: .*hold ids \[\(0, 3\), \(4, 6\)", shard=VocabShard(4, 2, 11, group)),
        "overlap": unequal(
            1, rank, r"shard: .*hold ids \[\(0, 3\), \(2, 6\)", shard=VocabShard(2, 4, 11, group)
        ),
        "wrong order": ({"shard": reverse}, r"shard: .*hold ids \[\(9, 11\), \(6, 9\)"),
        "another vocabulary on one": unequal(
            2, rank, r"shard: .* of \[11, 11, 12, 11\]", shard=VocabShard(6, 3, 12, group)
        ),
        "group of some ranks": (
            {"shard": VocabShard.of_rank(rank, 3, 11, groups[2])},
            "shard: .*the tensor-parallel group",
        ),
        "group of more ranks": (
            {"shard": VocabShard(0, 11, 11, group), "student": wide, "teacher": wide},
            "shard: .*hold ids .*, 11\\)",
        ),
        "no group": ({"shard": VocabShard.of_rank(rank, 3, 11, None)}, "shard: .*no process group"),
        "buffer on one": on(2, rank, "weight_grad", weight_grad=torch.zeros(3, 3)),
    }


def call(rank: int, group, **changes):
    """Make every kind of call on eleven ids over four ranks, with `changes`; return one call's values."""
    given = {
        "student": torch.arange(30.0).view(6, 5).cos() + rank,
        "teacher": torch.arange(30.0).view(6, 5).sin(),
        "targets": torch.arange(6),
        "shard": VocabShard.of_rank(rank, 3, 11, group),
        **changes,
    }
    targets, shard, student = given["targets"], given["shard"], Logits(given["student"])
    teacher = None if given["teacher"] is None else Logits(given["teacher"])
    options = {name: changes[name] for name in ("temperature",) if name in changes}
    if "weight_grad" in changes or not changes:
        states = Projection(torch.ones(6, 2), torch.ones(3, 2, requires_grad=True))
        options |= {"weight_grad": changes.get("weight_grad", torch.zeros(3, 2))}
        loss, _ = fused_objective(states, targets, lambda rows, tile: tile.logprob.sum(), shard, **options)
        loss.backward()
        del options["weight_grad"]
    if "teacher" not in changes:
        functional.log_prob(student, targets, shard, **options)
    options |= {"targets": targets, "support": "sampled"}
    return functional.reverse_kl(student, teacher, shard, **options)


def make_mistakes(rank: int, groups: dict) -> dict:
    """Return, for each mistake, the error, the expected message, and whether the next valid call is right."""
    reference, results = call(rank, groups[4]), {}
    for name in mistakes(rank, groups, groups[4]):
        # a group of its own, so that a mistake that hangs is detected and affects no other
        group = dist.new_group(range(RANKS), timeout=datetime.timedelta(seconds=15))
        changes, expected = mistakes(rank, groups, group)[name]
        try:
            call(rank, group, **changes)
            raised = "nothing"
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        try:
            is_right = torch.equal(call(rank, group), reference)
        except Exception as error:
            is_right = str(error)
        results[name] = raised, expected, is_right
    return results


def run_rank(rank: int, folder: str) -> None:
    """Run every case and every mistake on this rank; save the results in a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {4: dist.group.WORLD}
    for ranks in (1, 2):
        for start in range(0, RANKS, ranks):
            group = dist.new_group(range(start, start + ranks))
            if start <= rank < start + ranks:
                groups[ranks] = group
    saved = [run_case(rank, groups, case) for case in CASES]
    torch.save((saved, make_mistakes(rank, groups)), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Return every rank's results of every case, and its error for every mistake."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_shards_agree_with_the_unsharded_result(of_ranks, index):
    # Within rounding of unsharded float64, and the same bits on all ranks.
    function, form, dtype, layout, kernel = CASES[index]
    # -1e4 is as impossible in float64 as -inf, without NaN in autograd.
    inputs = unsharded_inputs(form, dtype, impossible=-1e4)
    weights = inputs.upstream.index_fill(0, inputs.ignored, 0.0)
    expected, gradients = inputs.exact(lambda f: f(function) * weights, TEMPERATURE)
    # plain torch computes its tail bucket in fp32: twice as far
    tolerance = TOLERANCE[dtype] * (2 if kernel == "reference" else 1)
    for first in range(0, RANKS, len(layout)):
        found = [saved[index] for saved, _ in of_ranks[first : first + len(layout)]]
        values, first_gradients = found[0]
        assert values.dtype == dtype and (values[inputs.ignored] == 0).all()
        assert all(torch.equal(other, values) for other, _ in found)
        if form == "projection":
            hidden_grad = first_gradients[0]
            assert all(torch.equal(g[0], hidden_grad) for _, g in found)
            assert (hidden_grad[inputs.ignored] == 0).all()
            ours = [hidden_grad, torch.cat([g[1] for _, g in found])]
        else:
            ours = [torch.cat([g[0] for _, g in found], dim=1)]
            assert (ours[0][inputs.ignored] == 0).all()
        if form in BARRED:
            assert (ours[0][:, BARRED[form]] == 0).all()
        products = values * weights.to(dtype)
        assert norm_error(products, expected) <= tolerance
        assert (products.sum() - expected.sum()).abs() / expected.abs().sum() <= tolerance
        assert all(norm_error(x, y) <= tolerance for x, y in zip(ours, gradients, strict=True))


@each_row("mistake", mistakes(0, {2: None}, None))
def test_a_mistake_is_an_error_on_every_rank(of_ranks, mistake):
    for _, results in of_ranks:
        raised, expected, is_right = results[mistake]
        assert re.match(f"ValueError: .*{expected}", raised)
        assert is_right is True


def run_pair(rank: int, folder: str, mistake: str) -> None:
    """Run one of two ranks whose inputs would make them exchange tensors of different sizes."""
    timeout = datetime.timedelta(seconds=10)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout
    )
    shard, x, targets = VocabShard.of_rank(rank, 6, 11, dist.group.WORLD), torch.zeros(7, 6), torch.arange(7)
    tile_tokens = rank + 2 if mistake == "tile_tokens" else None
    if mistake == "ignored tokens" and rank == 1:
        targets[3:] = IGNORED
    if mistake == "float64" and rank == 1:
        x = x.double()
    try:
        functional.log_prob(Logits(x), targets, shard, tile_tokens=tile_tokens)
    except ValueError as error:
        Path(f"{folder}/{rank}").write_text(str(error))
    found = functional.log_prob(Logits(torch.zeros(7, 6)), torch.arange(7), shard)
    assert found.tolist() == pytest.approx([-math.log(11)] * 7)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("mistake", ["ignored tokens", "float64", "tile_tokens"])
def test_sizes_of_exchanged_tensors_are_checked(tmp_path, mistake):
    # Gloo ends the process where they differ, NCCL waits: so each needs its own launch.
    mp.spawn(run_pair, (str(tmp_path), mistake), nprocs=2)
    assert all((tmp_path / str(rank)).read_text() for rank in range(2))
