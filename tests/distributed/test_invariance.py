"""Compare the gradient of a batch, for every split of it, with float64 autograd.

The reference is autograd on the Hugging Face model.

The same dumped steps are replayed under every layout; loss, gradient norm and the weights after the last step
are compared with tests/helpers/reference.py, which knows nothing of shards, tiles or packing.
"""

from __future__ import annotations

import math

import pytest
import torch
from launch import run_jobs
from reference import Reference, logps
from rollouts import write_rollouts
from safetensors.torch import load_file
from samples import sample_rows
from tiny import make_model, save_folder

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.tokens import read_tokens

TP, PP, VPP, CP, EP, ETP, SP, NO_DO = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.virtual_pipeline_model_parallel_size=",
    "parallel.context_parallel_size=",
    "parallel.expert_model_parallel_size=",
    "parallel.expert_tensor_parallel_size=",
    "parallel.sequence_parallel=true",
    "parallel.use_distributed_optimizer=false",
)
# A small bucket size makes several buckets in these small models.
OVERLAP_REDUCE = ["parallel.overlap_grad_reduce=true", "parallel.ddp_bucket_size=2000"]
OVERLAP = [*OVERLAP_REDUCE, "parallel.overlap_param_gather=true"]
RECOMPUTE = "megatron={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"
ONE_STEP = "train.steps=1"
RELATIVE, WEIGHTS = 1e-5, 1e-4
MANY_WRONG = ([0, 0, 0, 1],) * 4  # twelve of sixteen samples distilled
LAST_ONLY = ([0] * 4, [1] * 4, [0] * 4, [1, 1, 1, 0])  # one distilled sample: most ranks have none
ALL_WRONG = ([0, 0, 0, 0],) * 4
ALL_RIGHT = ([1, 1, 1, 1],) * 4

# name → (where rollouts come from, overrides, the reference's settings)
CASES = {
    "srpo": ("mixed", [], dict(beta=1.0)),
    "untied": ("untied", [], dict(beta=1.0)),
    "grpo": (
        "mixed",
        ["algorithm.name=grpo", "algorithm.mini_batch_prompts=2"],
        dict(beta=0.0, mini_batches=2),
    ),
    "sdpo": ("mixed", ["algorithm.name=sdpo", ONE_STEP], dict(beta=0.0)),
    "mix": ("mixed", ["algorithm.name=advantage_mix", ONE_STEP], dict(beta=0.0)),
    "top_k": (
        "mixed",
        ["algorithm.divergence_support=student_topk", "algorithm.divergence_topk=20", ONE_STEP],
        dict(beta=1.0, support="student_topk", top_k=20),
    ),
    "teacher_top_k": (
        "mixed",
        ["algorithm.divergence_support=teacher_topk", "algorithm.divergence_topk=20", ONE_STEP],
        dict(beta=1.0, support="teacher_topk", top_k=20),
    ),
    "sampled": (
        "mixed",
        ["algorithm.divergence_support=sampled", "algorithm.divergence=reverse", ONE_STEP],
        dict(beta=1.0, kind="reverse", support="sampled"),
    ),
    "trust_region": (
        "mixed",
        ["teacher.kind=trust_region", "teacher.interpolation=0.4"],
        dict(beta=1.0, trust_region=0.4),
    ),
    "forward": (
        "mixed",
        ["algorithm.divergence=forward", "algorithm.entropy_beta=0", ONE_STEP],
        dict(beta=0.0, kind="forward"),
    ),
    "reverse": (
        "mixed",
        ["algorithm.divergence=reverse", "algorithm.loss_aggregation=seq_mean", ONE_STEP],
        dict(beta=1.0, kind="reverse", aggregation="seq_mean"),
    ),
    "many_routed": ("many_wrong", [ONE_STEP], dict(beta=1.0)),
    "one_routed": ("last_only", [ONE_STEP], dict(beta=1.0)),
    "none_right": ("all_wrong", [ONE_STEP], dict(beta=1.0)),
    "none_wrong": ("all_right", [ONE_STEP], dict(beta=1.0)),
    "moe": ("qwen3_moe", [], dict(beta=1.0)),
    "moe_one_routed": ("qwen3_moe_last_only", [ONE_STEP], dict(beta=1.0)),
    # A decay that moves weights beyond the tolerance: biases and norms must not change by it.
    "qwen2": ("qwen2", ["optimizer.weight_decay=5"], dict(beta=1.0, weight_decay=5)),
    "llama": ("llama", [], dict(beta=1.0)),
    "turns": ("turns", [], dict(beta=1.0)),
    "turns_seq_mean": (
        "turns",
        ["algorithm.loss_aggregation=seq_mean", "algorithm.mini_batch_prompts=2"],
        dict(beta=1.0, aggregation="seq_mean", mini_batches=2),
    ),
}
# ranks → {layout: (overrides, the cases it runs)}
LAYOUTS = {
    1: {
        "one": ([], list(CASES)),
        "alone": (["train.micro_batch_tokens=1"], ["srpo"]),  # each sequence in a micro-batch of its own
        "small": (["train.micro_batch_tokens=240"], ["srpo"]),
        "full-recompute": ([RECOMPUTE], ["moe"]),
        "selective-recompute": (["megatron={recompute_granularity: selective}"], ["srpo"]),
    },
    2: {
        "tp2": ([TP + "2"], ["srpo", "teacher_top_k"]),
        "tp2-sp": ([TP + "2", SP], ["moe", "qwen2", "turns"]),
        "pp2": ([PP + "2"], ["srpo", "trust_region", "llama", "turns"]),
        "pp2-vpp2": ([PP + "2", VPP + "2"], ["one_routed"]),
        "dp2": ([], ["srpo", "many_routed", "none_wrong", "turns_seq_mean"]),
        "dp2-replicated": ([NO_DO], ["srpo"]),
        "dp2-overlap": (OVERLAP, ["untied", "grpo", "one_routed", "moe"]),
        "dp2-replicated-overlap": ([NO_DO, *OVERLAP_REDUCE], ["srpo"]),
        "dp2-offload": (["optimizer.optimizer_cpu_offload=true"], ["srpo", "grpo"]),
        "ep2": ([EP + "2"], ["moe", "moe_one_routed"]),
        "ep2-replicated": ([EP + "2", NO_DO], ["moe"]),
        "cp2": ([CP + "2"], ["srpo", "one_routed", "trust_region", "turns"]),
        "cp2-replicated-recompute": ([CP + "2", NO_DO, RECOMPUTE], ["srpo"]),
        "cp2-ep2": ([CP + "2", EP + "2"], ["moe"]),
    },
    4: {
        "tp4": ([TP + "4"], ["untied", "top_k", "sampled"]),
        "tp2-pp2": ([TP + "2", PP + "2"], ["srpo", "one_routed"]),
        "tp2-dp2": ([TP + "2"], ["mix", "reverse", "trust_region"]),
        "tp2-pp2-vpp2-sp": ([TP + "2", PP + "2", VPP + "2", SP], ["srpo"]),
        "tp2-dp2-overlap": ([TP + "2", SP, *OVERLAP], ["srpo"]),
        "pp2-vpp2-dp2-overlap": ([PP + "2", VPP + "2", *OVERLAP], ["untied", "grpo"]),
        "ep2-dp2": ([EP + "2"], ["moe"]),
        "ep2-dp2-overlap": ([EP + "2", *OVERLAP], ["moe"]),
        "ep2-dp2-replicated": ([EP + "2", NO_DO], ["moe"]),
        "pp2-dp2": ([PP + "2"], ["sdpo", "none_right"]),
        "dp4": ([], ["srpo", "one_routed"]),
        "pp2-ep2": ([PP + "2", EP + "2"], ["moe"]),
        "tp2-sp-ep2": ([TP + "2", SP, EP + "2"], ["moe"]),
        "tp2-sp-ep4-etp1": ([TP + "2", SP, EP + "4", ETP + "1"], ["moe"]),
        "cp4": ([CP + "4"], ["srpo"]),
        "cp2-tp2-sp": ([CP + "2", TP + "2", SP], ["srpo"]),
        "cp2-dp2-overlap": ([CP + "2", *OVERLAP], ["srpo"]),
        "cp2-dp2-replicated": ([CP + "2", NO_DO], ["sdpo"]),
        "cp2-pp2-vpp2": ([CP + "2", PP + "2", VPP + "2"], ["srpo"]),
        "cp2-tp2-sp-ep2": ([CP + "2", TP + "2", SP, EP + "2"], ["moe"]),
    },
}
PAIRS = [
    (ranks, layout, case)
    for ranks, layouts in LAYOUTS.items()
    for layout, (_, cases) in layouts.items()
    for case in cases
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write start models, dumped rollouts and the configuration file."""
    root = tmp_path_factory.mktemp("invariance")
    sources = {}
    for name, family, tied, verdicts in (
        ("mixed", "qwen3", True, None),
        ("turns", "qwen3", True, None),
        ("untied", "qwen3", False, None),
        ("many_wrong", "qwen3", True, MANY_WRONG),
        ("last_only", "qwen3", True, LAST_ONLY),
        ("all_wrong", "qwen3", True, ALL_WRONG),
        ("all_right", "qwen3", True, ALL_RIGHT),
        ("qwen3_moe", "qwen3_moe", False, None),
        ("qwen3_moe_last_only", "qwen3_moe", False, LAST_ONLY),
        ("qwen2", "qwen2", True, None),
        ("llama", "llama", False, None),
    ):
        # 261 rows pad to 272, 288 and 320 at TP 1, 2 and 4: uneven shards
        model = make_model(family, tied=tied, vocab_size=270 if tied else 261)
        folder = HFFolder(save_folder(root / f"{name}-hf", model))
        options = {"steps": 2} if verdicts is None else {"verdicts": verdicts, "steps": 1}
        options["turns"] = name == "turns"
        sources[name] = (folder, write_rollouts(root / f"{name}-rollouts", folder, model, **options))
    config = root / "config.yaml"
    config.write_text(
        "model: {hf_path: set, dtype: float32}\n"
        "parallel: {distributed_timeout_minutes: 1}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 128,\n"
        "  max_response_tokens: 64}\n"
        "teacher: {max_prompt_tokens: 160}\n"
        "train: {steps: 2, micro_batch_tokens: 4000}\n"
        "optimizer: {lr: 1.0e-3, lr_warmup_steps: 2}\n"
        "evaluation: {every: 0}\n"
        "logging: {dir: set}\n"
    )
    return root, config, sources


@pytest.fixture(scope="module")
def runs(world):
    """Train every (layout, case) in three launches."""
    root, config, sources = world
    done = {}
    for ranks, layouts in LAYOUTS.items():
        jobs = {}
        for layout, (overrides, cases) in layouts.items():
            for case in cases:
                folder, rollouts = sources[CASES[case][0]]
                jobs[f"{layout}_{case}"] = [
                    f"model.hf_path={folder.path}",
                    f"rollout.replay={rollouts}",
                    *CASES[case][1],
                    *overrides,
                ]
        done |= run_jobs(ranks, config, jobs, root)
    return done


def teacher_distance(reference):
    """Return ‖θ - θ'‖ / ‖θ‖ of the reference's policy and teacher."""
    pairs = list(zip(reference.model.parameters(), reference.teacher.parameters(), strict=True))
    gap, norm = (
        sum(part.detach().square().sum() for part in parts)
        for parts in ((p - q for p, q in pairs), (p for p, _ in pairs))
    )
    return float((gap / norm).sqrt())


@pytest.fixture(scope="module")
def references(world, runs):
    """Return case → ([(loss, gradient norm)], final tensors, ‖θ - θ'‖/‖θ‖), in float64.

    The tensors are those of the model after the last step, as transformers saves them.
    """
    root, _, sources = world
    results = {}
    for case, (source, _, options) in CASES.items():
        options = dict(options)
        mini_batches = options.pop("mini_batches", 1)
        reference = Reference(sources[source][0].path, lr=1e-3, warmup=2, **options)
        run = runs[f"one_{case}"]
        steps = [
            reference.run(file, mini_batches)
            for file in sorted((run.folder / "rollouts").glob("step_??????.jsonl"))
        ]
        reference.model.save_pretrained(root / f"{case}-reference")
        results[case] = (
            steps,
            load_file(root / f"{case}-reference" / "model.safetensors"),
            teacher_distance(reference),
        )
    return results


@pytest.mark.parametrize(("ranks", "layout", "case"), PAIRS)
def test_loss_gradient_and_weights_do_not_depend_on_the_split(runs, references, ranks, layout, case):
    # To 1e-5 relative of float64 autograd at every step; weights after the last step to 1e-4.
    steps, model, distance = references[case]
    rows = runs[f"{layout}_{case}"].rows
    assert len(rows) == len(steps)
    for row, (loss, norm) in zip(rows, steps, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=RELATIVE, abs=1e-9)
        assert row["grad_norm"] == pytest.approx(norm, rel=RELATIVE, abs=1e-9)
        if case != "grpo":
            follows = 0.0 if case == "trust_region" else 0.05  # share of the distance in a step
            assert row["teacher_followed"] == pytest.approx(
                follows, rel=5e-3
            )  # weight decay alone moves the least, and fp32 rounds that
    if case != "grpo":
        assert rows[-1]["teacher_distance"] == pytest.approx(distance, rel=5e-3)
    weights = runs[f"{layout}_{case}"].weights
    assert set(weights) == set(model)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), model[name], atol=WEIGHTS, rtol=0)


def test_the_cases_exercise_what_they_claim(runs):
    # Some importance weights are capped, some demonstrations cut, some responses have one token; some samples
    # are routed, others not.
    rows = runs["one_srpo"].rows
    assert any(row["importance_clip_share"] > 0 for row in rows)
    assert any(row["teacher_prompts_cut"] > 0 for row in rows)
    assert all(0 < row["sdpo_token_share"] < 1 for row in rows)
    assert runs["one_many_routed"].rows[0]["sdpo_sample_share"] == 0.75
    assert runs["one_one_routed"].rows[0]["sdpo_sample_share"] == 1 / 16
    samples = sample_rows(runs["one_srpo"].folder / "rollouts" / "step_000001.jsonl")
    assert any(
        len(sample["response_ids"]) == 1 for sample in samples
    )  # so that context-parallel ranks have none of some
    turns = sample_rows(runs["one_turns"].folder / "rollouts" / "step_000001.jsonl")
    masks = [sample["loss_mask"] for sample in turns]
    assert any(mask[0] and mask[-1] and not all(mask) for mask in masks)
    assert any(not mask[0] and not mask[-1] for mask in masks)
    assert any((len(sample["prompt"]["ids"]) + len(sample["response_ids"]) - 1) % 4 for sample in samples)


@pytest.mark.parametrize("run", ["one_none_right", "pp2-dp2_none_right", "one_none_wrong", "dp2_none_wrong"])
def test_groups_of_one_kind_have_zero_gradient(runs, run):
    # METHOD §7 (h): exactly zero, finite metrics, and the same metric keys as any other step.
    row = runs[run].rows[0]
    assert row["loss"] == 0 and row["grad_norm"] == 0 and row["zero_advantage_share"] == 1
    assert row["updates_skipped"] == 0 and None not in row.values()
    assert set(row) == set(runs["one_srpo"].rows[0])


def test_replay_routes_alike_on_every_layout(runs):
    # Dumped routes (siblings, teacher prompts, advantages) are the same bytes at every layout.
    first = (runs["one_srpo"].folder / "rollouts" / "step_000001.jsonl").read_text()
    for run in ("tp2_srpo", "dp4_srpo", "tp2-pp2_srpo"):
        assert (runs[run].folder / "rollouts" / "step_000001.jsonl").read_text() == first


@pytest.mark.parametrize(
    "run",
    [f"{layout}_srpo" for layout in ("pp2", "dp2", "tp2-pp2", "cp4", "cp2-tp2-sp")]
    + ["one_turns", "cp2_turns"],
)
def test_token_values_are_the_references_on_every_layout(world, runs, run):
    # Values of step_000001.tokens.jsonl against float64 logits of the complete vocabulary.
    folder, _ = world[2]["turns" if run.endswith("turns") else "mixed"]
    model = Reference(folder.path, lr=1e-3, warmup=2, beta=1.0)
    samples = sample_rows(runs[run].folder / "rollouts" / "step_000001.jsonl")
    found = dict(read_tokens(runs[run].folder, 1))
    assert len(found) == 8 and set(found) <= {(sample["prompt"]["id"], sample["index"]) for sample in samples}
    taught = {}
    for sample in samples:
        if sample["route"]["distillation_weight"]:
            taught[sample["prompt"]["id"], sample["index"]] = logps(
                model.teacher, sample["route"]["teacher_ids"], sample["response_ids"]
            )[sample["loss_mask"]]
    raw = {key: (logq.exp() * logq).sum(1).exp() for key, logq in taught.items()}
    mean = torch.cat(list(raw.values())).mean()
    compared = 0
    for sample in samples:
        key = sample["prompt"]["id"], sample["index"]
        if (row := found.get(key)) is None:
            continue
        logp, chosen = (
            logps(model.model, sample["prompt"]["ids"], sample["response_ids"])[sample["loss_mask"]],
            torch.tensor(sample["policy_ids"])[:, None],
        )
        expected = {"logprob": logp.gather(1, chosen)[:, 0], "entropy": -(logp.exp() * logp).sum(1)}
        tops = {"top": logp}
        if (logq := taught.get(key)) is not None:
            logm = torch.logaddexp(logp, logq) - math.log(2)
            expected["divergence"] = (
                (logp.exp() * (logp - logm)).sum(1) + (logq.exp() * (logq - logm)).sum(1)
            ) / 2
            expected |= {
                "teacher_logprob": logq.gather(1, chosen)[:, 0],
                "teacher_entropy": -(logq.exp() * logq).sum(1),
            }
            expected["weight"] = raw[key] / mean
            tops["teacher_top"] = logq
        assert set(row) == {"step", "prompt_id", "index", "tokens", *expected, *tops}
        for name, values in expected.items():
            torch.testing.assert_close(
                torch.tensor(row[name], dtype=torch.float64), values, rtol=1e-4, atol=2e-5
            )
        for name, values in tops.items():
            best, ids = values.topk(5, dim=1)
            torch.testing.assert_close(
                torch.tensor([[p for _, p in place] for place in row[name]]).double(),
                best,
                rtol=1e-4,
                atol=2e-5,
            )
            assert [place[0][0] for place in row[name]] == [
                folder.tokenizer.decode([token]) for token in ids[:, 0].tolist()
            ]
        assert row["tokens"] == [folder.tokenizer.decode([token]) for token in sample["policy_ids"]]
        compared += logq is not None
    assert 0 < compared < 8
