"""The family with the vocabulary on 1, 2 and 4 ranks against unsharded float64, and mistakes that every rank
must hear of.
"""

import contextlib
import datetime
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_srpo.vocab_parallel import functional, fused
from megatron_srpo.vocab_parallel.fused import IGNORED, fused_objective
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

sys.path.insert(0, str(Path(__file__).parent))  # the spawned processes find their neighbours too
from exact import WIDE  # noqa: E402
from test_per_token import STATISTICS, Inputs, _members, error  # noqa: E402

RANKS, VOCABULARY, TEMPERATURE = 4, 3001, 0.9
LAYOUTS = [  # columns a rank
    (3001,),
    (2000, 1001),
    (3001, 0),
    (800, 800, 800, 601),
    (1500, 1500, 1, 0),
    (1000, 700, 0, 1301),
]
LAST = len(LAYOUTS) - 1
BARRED = {  # columns of -inf: all that a rank has in the last layout; all but fewer than K
    "barred": slice(1000, 1700),
    "scarce": slice(60, 3001),
}
FORMS = ("logits", "projection", *BARRED)
MEMBERS = {
    str(x): x
    for x in STATISTICS + _members(100)
    if x.kind.support in ("full", "sampled") or x.kind.alpha == 0.5
}
TOLERANCE = {torch.float32: 2e-6, WIDE: 1e-11}
CASES = [
    (form, name, dtype, layout, kernel)
    for form, name, dtype, layout, kernel in itertools.product(
        FORMS, MEMBERS, TOLERANCE, range(len(LAYOUTS)), ("fastest", "reference")
    )
    if (layout in (1, 4, LAST) if form in BARRED else dtype == torch.float32 or layout in (0, 1, LAST))
    and (kernel == "fastest" or layout == LAST)
]


def whole_inputs(form: str, dtype: torch.dtype, impossible: float = -math.inf) -> Inputs:
    """Eight tokens, two of them ignored, of all columns, with a trust-region teacher; columns of -inf are
    `impossible`.
    """
    kind = "projection" if form == "projection" else "logits"
    inputs = Inputs(kind, 8, VOCABULARY, VOCABULARY, width=32, dtype=dtype, scale=0.35, share=0.25)
    if form in BARRED:
        for tensor in (*inputs.student, *inputs.teacher_tensors):
            tensor[:, BARRED[form]] = impossible
        inputs.targets %= BARRED[form].start
    inputs.upstream = inputs.upstream.abs()  # sums of it are not small beside their addends
    inputs.ignored = torch.tensor([2, 7])
    return inputs


def columns_of(source, start: int, width: int):
    """One rank's columns, and two more that are padding."""
    if isinstance(source, InterpolatedLogits):
        return source._replace(
            **{name: columns_of(getattr(source, name), start, width) for name in ("reference", "policy")}
        )
    if isinstance(source, Logits):
        return Logits(
            torch.nn.functional.pad(source.logits[:, start : start + width], (0, 2), value=math.nan)
        )
    return Projection(
        source.hidden,
        torch.nn.functional.pad(source.weight[start : start + width], (0, 0, 0, 2), value=math.nan),
    )


def run_case(rank: int, groups: dict, inputs: Inputs, member, layout: int):
    """This rank's values and gradients, its padded columns cut off; hidden gradients are summed over the
    ranks.
    """
    widths = LAYOUTS[layout]
    ranks = len(widths)
    place, targets = rank % ranks, inputs.targets.clone()
    targets[inputs.ignored] = IGNORED
    start, width = sum(widths[:place]), widths[place]
    shard = VocabShard(start, width, VOCABULARY, groups[ranks])
    part = columns_of(inputs.student, start, width)
    student = type(part)(*(x.clone().requires_grad_() for x in part))
    value = member.ours(
        student,
        columns_of(inputs.teacher, start, width),
        targets,
        shard,
        temperature=TEMPERATURE,
        tile_tokens=3,
    )
    (value * inputs.upstream.to(value.dtype)).sum().backward()
    if isinstance(student, Logits):
        assert (student.logits.grad[:, width:] == 0).all()
        return value.detach(), [student.logits.grad[:, :width]]
    assert (student.weight.grad[width:] == 0).all()
    dist.all_reduce(student.hidden.grad, group=groups[ranks])
    return value.detach(), [student.hidden.grad, student.weight.grad[:width]]


def mistakes(rank: int, groups: dict, group) -> dict:
    """Calls that do not fit, on one rank or on all; each with this rank's changes and what it should say."""
    elsewhere = lambda culprit, said: (
        said if rank == culprit else f"rank {culprit} was given what does not fit"
    )  # noqa: E731
    on = lambda culprit, **changes: changes if rank == culprit else {}  # noqa: E731
    x, wide, targets = torch.zeros(6, 5), torch.zeros(6, 11), torch.arange(6)
    reverse = VocabShard.of_rank(3 - rank, 3, 11, group)
    return {
        "target outside everywhere": ({"targets": targets + 6}, "targets: ids from 11 to 11 at 1 places"),
        "target outside on one": (on(2, targets=targets - 1), elsewhere(2, "targets: ids from -1 to -1")),
        "targets of another dtype on one": (
            on(0, targets=targets.int()),
            elsewhere(0, "targets.*torch.int32"),
        ),
        "teacher of another dtype on one": (
            on(3, teacher=x.double()),
            elsewhere(3, "teacher of 6 tokens .torch.float64"),
        ),
        "option on one": (on(1, temperature=0.0), elsewhere(1, "temperature 0.0")),
        "fewer tokens on one": (
            on(1, student=x[:5], teacher=x[:5], targets=targets[:5]),
            r"tokens: .*given \[6, 5, 6, 6\]",
        ),
        "fewer distilled on one": (on(3, teacher=x[:4]), r"tokens.*given.* \[\d, \d, \d, 4\]"),
        "no targets on one": (on(1, targets=None), elsewhere(1, "targets: None")),
        "no teacher on one": (on(2, teacher=None), elsewhere(2, "teacher: None")),
        "no tokens on one": (
            on(0, student=x[:0], teacher=x[:0], targets=targets[:0]),
            r"tokens: .*given \[0, 6, 6, 6\]",
        ),
        "gap": (on(1, shard=VocabShard(4, 2, 11, group)), r"shard: .*hold ids \[\(0, 3\), \(4, 6\)"),
        "overlap": (on(1, shard=VocabShard(2, 4, 11, group)), r"shard: .*hold ids \[\(0, 3\), \(2, 6\)"),
        "wrong order": ({"shard": reverse}, r"shard: .*hold ids \[\(9, 11\), \(6, 9\)"),
        "another vocabulary on one": (
            on(2, shard=VocabShard(6, 3, 12, group)),
            r"shard: .* of \[11, 11, 12, 11\]",
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
        "buffer on one": (on(2, weight_grad=torch.zeros(3, 3)), elsewhere(2, "weight_grad")),
    }


def call(rank: int, group, **changes):
    """Every kind of call on eleven ids over four ranks, good but for `changes`; the values of one of them."""
    given = {
        "student": torch.arange(30.0).view(6, 5).cos() + rank,
        "teacher": torch.arange(30.0).view(6, 5).sin(),
    } | changes
    targets, shard = (
        given.get("targets", torch.arange(6)),
        given.get("shard", VocabShard.of_rank(rank, 3, 11, group)),
    )
    student, teacher = (
        Logits(given["student"]),
        None if given["teacher"] is None else Logits(given["teacher"]),
    )
    options = {name: changes[name] for name in ("temperature",) if name in changes}
    if "weight_grad" in changes or not changes:
        states = Projection(torch.ones(6, 2), torch.ones(3, 2, requires_grad=True))
        buffer = changes.get("weight_grad", torch.zeros(3, 2))
        fused_objective(states, targets, lambda rows, tile: tile.logprob.sum(), shard, weight_grad=buffer)[
            0
        ].backward()
    if "teacher" not in changes:
        functional.log_prob(student, targets, shard, **options)
    return functional.reverse_kl(student, teacher, shard, targets=targets, support="sampled", **options)


def make_mistakes(rank: int, groups: dict) -> dict:
    """Of each mistake: what was raised, what should have been said, and whether a good call came out well
    afterwards.
    """
    reference, heard = call(rank, groups[4]), {}
    for name in mistakes(rank, groups, groups[4]):
        group = dist.new_group(
            range(RANKS), timeout=datetime.timedelta(seconds=15)
        )  # one that hangs is seen, and spoils no other
        changes, expected = mistakes(rank, groups, group)[name]
        try:
            call(rank, group, **changes)
            raised = "nothing"
        except Exception as problem:
            raised = f"{type(problem).__name__}: {problem}"
        try:
            is_well = torch.equal(call(rank, group), reference)
        except Exception as problem:
            is_well = str(problem)
        heard[name] = raised, expected, is_well
    return heard


def run_rank(rank: int, folder: str) -> None:
    """What one process does: every case on its columns, then every mistake; saved in a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {4: dist.group.WORLD}
    for ranks in (1, 2):
        for start in range(0, RANKS, ranks):
            group = dist.new_group(range(start, start + ranks))
            if start <= rank < start + ranks:
                groups[ranks] = group
    inputs, saved = {(form, dtype): whole_inputs(form, dtype) for form in FORMS for dtype in TOLERANCE}, {}
    plain = lambda tile_tokens, shard, divergence, own: ReferenceKernel(shard, divergence)  # noqa: E731
    for form, name, dtype, layout, kernel in CASES:
        with pytest.MonkeyPatch.context() if kernel == "reference" else contextlib.nullcontext() as patch:
            if patch:
                patch.setattr(fused, "_kernel", plain)
            saved[form, name, str(dtype), layout, kernel] = run_case(
                rank, groups, inputs[form, dtype], MEMBERS[name], layout
            )
    torch.save((saved, make_mistakes(rank, groups)), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Every rank's results of every case, and what it heard of every mistake."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(RANKS)]


def largest_errors(of_ranks, form: str, name: str) -> dict:
    """{(dtype, ranks, kernel): largest error of the values, of their weighted sum and of the gradients} over
    layouts.
    """
    errors = {}
    for dtype in TOLERANCE:
        inputs = whole_inputs(
            form, dtype, impossible=-1e4
        )  # as impossible in float64, and no NaN in autograd
        weights = inputs.upstream.index_fill(0, inputs.ignored, 0.0)
        value, gradients = inputs.exact(lambda f: f(MEMBERS[name]) * weights, TEMPERATURE)  # noqa: B023
        for layout, kernel in ((case[3], case[4]) for case in CASES if case[:3] == (form, name, dtype)):
            ranks = len(LAYOUTS[layout])
            for first in range(0, RANKS, ranks):
                found = [
                    saved[form, name, str(dtype), layout, kernel]
                    for saved, _ in of_ranks[first : first + ranks]
                ]
                assert all(
                    (values[inputs.ignored] == 0).all() and values.dtype == dtype for values, _ in found
                )
                assert all(torch.equal(values, found[0][0]) for values, _ in found)
                assert form == "projection" or all((g[inputs.ignored] == 0).all() for _, (g,) in found)
                ours = [torch.cat([g[-1] for _, g in found], dim=0 if form == "projection" else 1)]
                if form == "projection":
                    assert (
                        all(torch.equal(g[0], found[0][1][0]) for _, g in found)
                        and (found[0][1][0][inputs.ignored] == 0).all()
                    )
                    ours.insert(0, found[0][1][0])
                if form in BARRED:
                    assert (ours[0][:, BARRED[form]] == 0).all()
                products = found[0][0] * weights.to(dtype)
                new = [
                    error(products, value),
                    ((products.sum() - value.sum()).abs() / value.abs().sum()).item(),
                ]
                new += [error(x, y) for x, y in zip(ours, gradients, strict=True)]
                errors[dtype, ranks, kernel] = max(*new, errors.get((dtype, ranks, kernel), 0.0))
    return errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MEMBERS)
def test_shards_agree_with_the_whole(of_ranks, form, name):
    """Within rounding of unsharded float64, and the same bits on all ranks.

    Plain torch works out its tail bucket in fp32: twice as far.
    """
    for (dtype, ranks, kernel), largest in largest_errors(of_ranks, form, name).items():
        assert largest <= TOLERANCE[dtype] * (2 if kernel == "reference" else 1), (
            f"{dtype} on {ranks} ranks, {kernel}"
        )


@pytest.mark.parametrize("mistake", mistakes(0, {2: None}, None))
def test_every_rank_hears_of_a_mistake_and_goes_on(of_ranks, mistake):
    for _, heard in of_ranks:
        raised, expected, is_well = heard[mistake]
        assert re.match(f"ValueError: .*{expected}", raised)
        assert is_well is True


def run_pair(rank: int, folder: str, mistake: str) -> None:
    """Two ranks whose inputs would have them exchange tensors of different sizes."""
    timeout = datetime.timedelta(seconds=10)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout
    )
    shard, x, targets = VocabShard.of_rank(rank, 6, 11, dist.group.WORLD), torch.zeros(7, 6), torch.arange(7)
    if mistake == "ignored tokens" and rank == 1:
        targets[3:] = IGNORED
    if mistake == "float64" and rank == 1:
        x = x.double()
    try:
        functional.log_prob(
            Logits(x), targets, shard, tile_tokens=rank + 2 if mistake == "tile_tokens" else None
        )
    except ValueError as problem:
        Path(f"{folder}/{rank}").write_text(str(problem))
    assert functional.log_prob(Logits(torch.zeros(7, 6)), torch.arange(7), shard).tolist() == pytest.approx(
        [-math.log(11)] * 7
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("mistake", ["ignored tokens", "float64", "tile_tokens"])
def test_sizes_of_what_ranks_exchange_are_agreed_on(tmp_path, mistake):
    """Gloo ends the process where they differ, NCCL waits: so a launch for each."""
    mp.spawn(run_pair, (str(tmp_path), mistake), nprocs=2)
    assert all((tmp_path / str(rank)).read_text() for rank in range(2))
