"""Test the configuration file: accepted and refused values, and the messages of refusals."""

from operator import attrgetter

import pytest
import yaml
from good_config import GOOD
from tables import each_row

from megatron_srpo.algorithm import METHODS
from megatron_srpo.algorithm.methods.sdpo import SDPO
from megatron_srpo.config.load import load_config, save_config


def test_good_config(config_of):
    config = config_of(
        GOOD + "rollout:\n  prompts_per_step: 4\n  samples_per_prompt: 2\nalgorithm:\n  name: sdpo\n"
    )
    assert str(config.model.hf_path) == "some/folder" and config.train.steps == 3
    assert config.algorithm == SDPO()
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (4, 2)
    assert config.mini_batch_prompts == 4 and config.parallel.tensor_model_parallel_size == 1


# SRPO §4.1; the clipping bounds §2.1, the aggregation §3.3, the divergence as in SDPO.
PAPER_DEFAULTS = {
    "rollout.prompts_per_step": 32,
    "rollout.samples_per_prompt": 8,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_response_tokens": 8192,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.enable_thinking": False,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "optimizer.lr_warmup_steps": 10,
    "teacher.kind": "ema",
    "teacher.ema_rate": 0.05,
    "evaluation.samples": 16,
    "evaluation.temperature": 0.6,
    "evaluation.top_p": 0.95,
    "evaluation.every": 5,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.divergence": "jsd",
    "algorithm.divergence_topk": 100,
    "algorithm.advantage_std": False,
    "algorithm.loss_aggregation": "token_mean",
}


def test_paper_is_the_default(config_of):
    # Keys that a file omits have the papers' values, for every method.
    assert config_of(GOOD).algorithm.name == "srpo"
    for name in METHODS:
        config = config_of(GOOD, f"algorithm.name={name}")
        assert {key: attrgetter(key)(config) for key in PAPER_DEFAULTS} == PAPER_DEFAULTS


@each_row(
    "name, lr, mini_batch, beta, uses_teacher",
    [
        ("grpo", 1e-6, 8, 0.0, False),
        ("sdpo", 1e-5, 32, 0.0, True),
        ("srpo", 5e-6, 32, 1.0, True),
        ("advantage_mix", 5e-6, 32, 0.0, True),
    ],
)
def test_naming_the_algorithm_is_the_algorithm(config_of, name, lr, mini_batch, beta, uses_teacher):
    config = config_of(GOOD, f"algorithm.name={name}")
    assert (config.lr, config.mini_batch_prompts) == (lr, mini_batch)
    assert (config.algorithm.entropy_beta, config.algorithm.uses_teacher) == (beta, uses_teacher)


def test_own_learning_rate_and_mini_batch_win(config_of):
    config = config_of(GOOD, "optimizer.lr=0.5", "algorithm.mini_batch_prompts=16")
    assert (config.lr, config.mini_batch_prompts) == (0.5, 16)


def test_small_numbers_without_a_dot_are_numbers(config_of):
    # YAML 1.1 reads 1e-6 as text.
    assert yaml.safe_load("1e-6") == "1e-6"
    assert config_of(GOOD + "optimizer:\n  lr: 1e-6\n  adam_eps: 1e-9\n").optimizer.lr == 1e-6
    assert config_of(GOOD, "optimizer.lr=3e-6").optimizer.lr == 3e-6


def test_empty_sections_are_defaults(config_of):
    assert config_of(GOOD + "rollout:\nalgorithm:\nmegatron:\n") == config_of(GOOD)


def test_config_is_frozen(config_of):
    with pytest.raises(ValueError):
        config_of(GOOD).train.steps = 4


# ---- refusals
# --------------------------------------------------------------------------------------------------------


@each_row(
    "text, expected",
    [
        (
            GOOD + "rollout:\n  temprature: 1\n",
            "config.yaml:8: rollout.temprature: unknown key; did you mean temperature?",
        ),
        (
            GOOD + "algorithm:\n  name: grpo\n  clip_hihg: 1\n",
            "config.yaml:9: algorithm.clip_hihg: unknown key; did you mean clip_high?",
        ),
        (
            GOOD + "algorithm:\n  clip_hihg: 1\n",
            "config.yaml:8: algorithm.clip_hihg: unknown key; did you mean clip_high?",
        ),
        (GOOD + "rolout:\n  temperature: 1\n", "config.yaml:7: rolout: unknown key; did you mean rollout?"),
        (GOOD + "rolout:\n", "config.yaml:7: rolout: unknown key; did you mean rollout?"),
    ],
)
def test_unknown_keys_name_place_and_nearest(message_of, text, expected):
    assert message_of(text) == expected


def test_unknown_key_far_from_all_lists_the_known(message_of):
    message = message_of(GOOD + "teacher:\n  zzzz: 1\n")
    known = "ema_rate, feedback, interpolation, kind, max_prompt_tokens"
    assert message == f"config.yaml:8: teacher.zzzz: unknown key; known: {known}"


def test_another_algorithms_key_is_unknown(message_of):
    assert "algorithm.mix_lambda: unknown key" in message_of(
        GOOD + "algorithm:\n  name: srpo\n  mix_lambda: 0.5\n"
    )


def test_every_wrong_key_is_named(message_of):
    lines = message_of(GOOD + "rollout:\n  top_p: 2\n  engin: x\noptimizer:\n  lr: -1\n").split("\n")
    assert sorted(line.split(": ")[1] for line in lines) == ["optimizer.lr", "rollout.engin", "rollout.top_p"]
    assert {line.split(": ")[0] for line in lines} == {"config.yaml:8", "config.yaml:9", "config.yaml:11"}


@each_row(
    "name, expected",
    [
        ("srop", "config.yaml:8: algorithm.name: unknown algorithm 'srop'; did you mean srpo?"),
        (
            "reinforce",
            f"config.yaml:8: algorithm.name: unknown algorithm 'reinforce'; known: {', '.join(METHODS)}",
        ),
    ],
)
def test_unknown_algorithm(message_of, name, expected):
    assert message_of(GOOD + f"algorithm:\n  name: {name}\n") == expected


def test_algorithm_given_as_a_word(message_of):
    expected = "expected a section of keys (set algorithm.name=grpo), not 'grpo'"
    assert message_of(GOOD + "algorithm: grpo\n") == f"config.yaml:7: algorithm: {expected}"


@each_row("missing", ["model", "train", "logging"])
def test_required_sections(message_of, missing):
    tree = yaml.safe_load(GOOD)
    del tree[missing]
    first = {"model": "hf_path", "train": "steps", "logging": "dir"}[missing]
    expected = f"config.yaml: {missing}: is required; set {missing}.{first}"
    assert message_of(yaml.safe_dump(tree)) == expected


def test_required_key_names_its_section(message_of):
    expected = "config.yaml:3: train.steps: is required: training steps, each with one rollout batch"
    assert message_of(GOOD.replace("  steps: 3\n", "  seed: 3\n")) == expected
    assert message_of(GOOD.replace("  steps: 3\n", "")) == expected


@each_row(
    "key, value",
    [
        ("rollout.max_response_tokens", "0"),
        ("rollout.max_prompt_tokens", "0"),
        ("rollout.samples_per_prompt", "0"),
        ("rollout.prompts_per_step", "-1"),
        ("rollout.temperature", "0"),
        ("rollout.top_p", "0"),
        ("rollout.top_p", "1.5"),
        ("rollout.engine", "vllm"),
        ("train.steps", "0"),
        ("train.steps", "many"),
        ("train.steps", "1.5"),
        ("train.steps", ""),
        ("train.seed", "-1"),
        ("train.micro_batch_tokens", "0"),
        ("optimizer.lr", "0"),
        ("optimizer.lr", ".nan"),
        ("optimizer.adam_beta2", "1"),
        ("optimizer.clip_grad", "0"),
        ("teacher.kind", "best"),
        ("teacher.ema_rate", "0"),
        ("teacher.ema_rate", "1.01"),
        ("model.dtype", "float16"),
        ("parallel.tensor_model_parallel_size", "0"),
        ("parallel.context_parallel_size", "0"),
        ("parallel.expert_model_parallel_size", "0"),
        ("parallel.expert_tensor_parallel_size", "0"),
        ("parallel.virtual_pipeline_model_parallel_size", "1"),
        ("evaluation.every", "-1"),
        ("evaluation.samples", "0"),
        ("evaluation.temperature", "-0.1"),
        ("algorithm.divergence", "hellinger"),
        ("algorithm.divergence_alpha", "0"),
        ("algorithm.divergence_alpha", "1"),
        ("algorithm.dual_clip", "1"),
        ("algorithm.divergence_topk", "0"),
        ("algorithm.loss_aggregation", "sum"),
        ("algorithm.divergence_support", "top"),
        ("teacher.interpolation", "1"),
        ("train.logits_memory_mib", "0"),
    ],
)
def test_value_out_of_range(message_of, key, value):
    # The message names the override, the key and the given value.
    message = message_of(GOOD, f"{key}={value}")
    assert message.startswith(f"override '{key}={value}': {key}: ")
    assert message.endswith(f", not {yaml.safe_load(value)!r}") and "\n" not in message


def test_sampled_tokens_cannot_estimate_every_divergence(message_of):
    message = message_of(GOOD, "algorithm.divergence_support=sampled")
    assert message.startswith(
        "override 'algorithm.divergence_support=sampled': algorithm.divergence_support: sampled tokens"
    )
    assert message.endswith("not jsd; set algorithm.divergence: reverse")


@each_row("name", METHODS)
@each_row(
    "key, value",
    [
        ("lr", "0"),
        ("lr", "-1"),
        ("mini_batch_prompts", "0"),
        ("mini_batch_prompts", "-8"),
        ("entropy_beta", "-1"),
    ],
)
def test_every_algorithm_keeps_the_common_bounds(message_of, name, key, value):
    # An algorithm that sets its own default must keep the limits.
    message = message_of(GOOD, f"algorithm.name={name}", f"algorithm.{key}={value}")
    assert message.startswith(f"override 'algorithm.{key}={value}': algorithm.{key}: ")


def test_wrong_value_in_the_file_names_the_line(message_of):
    assert message_of(GOOD + "rollout:\n  max_response_tokens: 0\n").startswith(
        "config.yaml:8: rollout.max_response_tokens: "
    )


@each_row(
    "overrides, section, named",
    [
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel",
            ["true needs tensor_model_parallel_size"],
        ),
        (
            ["parallel.expert_tensor_parallel_size=2"],
            "parallel",
            ["expert_tensor_parallel_size", "expert_model_parallel_size > 1"],
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "parallel",
            ["virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size > 1"],
        ),
        (
            ["rollout.engine=openai", "rollout.urls=[http://me:secret@host:1]"],
            "rollout.urls",
            ["…@host:1", "no password", "rollout.openai.api_key_env"],
        ),
        (
            ["rollout.sglang.arguments=[--api-key, secret]", "rollout.engine=sglang", "rollout.servers=1"],
            "rollout.sglang.arguments",
            ["API key", "rollout.sglang.api_key_env"],
        ),
        (["resume.override=[optimizer.lr,train.step]"], "resume.override", ["'train.step' is not a key"]),
        (["evaluation.temperature=0"], "evaluation.temperature", ["greedy", "samples: 1"]),
        (
            ["rollout.async_steps=1", "rollout.over_sampling=2"],
            "rollout.max_staleness",
            ["two versions old", "set 2"],
        ),
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt", ["srpo", "at least 2"]),
        (
            ["rollout.samples_per_prompt=1", "algorithm.name=grpo"],
            "rollout.samples_per_prompt",
            ["grpo", "at least 2"],
        ),
        (
            ["rollout.prompts_per_step=12", "algorithm.name=grpo"],
            "rollout.prompts_per_step",
            ["12", "algorithm.mini_batch_prompts", "8"],
        ),
    ],
)
def test_contradictions(message_of, overrides, section, named):
    message = message_of(GOOD, *overrides)
    assert f": {section}: " in message and "secret" not in message.partition(f": {section}: ")[2]
    for part in named:
        assert part in message


@each_row(
    "overrides",
    [
        ["parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=2"],
        ["parallel.virtual_pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ["evaluation.temperature=0", "evaluation.samples=1"],
        ["resume.override=[algorithm.entropy_beta,rollout.sglang.port,megatron.recompute_granularity,task]"],
        ["rollout.async_steps=1", "rollout.over_sampling=2", "rollout.max_staleness=2"],
        ["rollout.samples_per_prompt=2"],
        ["rollout.prompts_per_step=12", "algorithm.name=grpo", "algorithm.mini_batch_prompts=null"],
        ["rollout.prompts_per_step=4", "algorithm.name=grpo"],
        ["train.micro_batch_tokens=1"],
    ],
)
def test_almost_contradictions(config_of, overrides):
    # The nearest allowed neighbour of each refusal; a mini-batch is never larger than the batch.
    config = config_of(GOOD, *overrides)
    assert config.rollout.prompts_per_step % config.mini_batch_prompts == 0


@each_row(
    "text, override, place",
    [
        (GOOD + "rollout:\n  samples_per_prompt: 1\n", None, "config.yaml:8"),
        (GOOD, "rollout.samples_per_prompt=1", "override 'rollout.samples_per_prompt=1'"),
    ],
)
def test_contradictions_name_their_place(message_of, text, override, place):
    # load_config names every wrong key with its file and line, or the override.
    assert message_of(text, *([override] if override else [])).startswith(
        f"{place}: rollout.samples_per_prompt: "
    )


@each_row(
    "text, expected",
    [
        ("task: {nmae: addition}\n", "config.yaml:7: task.nmae: unknown key; did you mean name?"),
        (
            "task:\n  mixture: [{nmae: addition}]\n",
            "config.yaml:8: task.mixture.0.nmae: unknown key; did you mean name?",
        ),
        (
            "task:\n  name: x\n  mixture: [addition]\n",
            "config.yaml:9: task.mixture: task.name belongs in one of its tasks",
        ),
        (
            "task:\n  mixture: [addition, addition]\n",
            "config.yaml:8: task.mixture: two tasks are called addition",
        ),
        ("task:\n  mixture: []\n", "config.yaml:8: task.mixture: expected at least 1 of them, not []"),
        (
            "task:\n  mixture: [{name: addition, weight: 0}]\n",
            "config.yaml:8: task.mixture.0.weight: expected more than 0",
        ),
        (
            "task:\n  weight: 2\n",
            "config.yaml:8: task.weight: is a task's share of task.mixture, but there is no mixture",
        ),
        ("task:\n  name: a b\n", "config.yaml:8: task.name: expected text that matches"),
        ("task:\n  rule: lax\n", "config.yaml:8: task.rule: expected paper or strict, not 'lax'"),
        (
            "evaluation:\n  tasks: [{weigt: 1}]\n",
            "config.yaml:8: evaluation.tasks.0.weigt: unknown key; did you mean weight?",
        ),
        (
            "evaluation:\n  splits: [train]\n",
            "config.yaml:8: evaluation.splits.0: expected test or validation, not 'train'",
        ),
    ],
)
def test_wrong_tasks(message_of, text, expected):
    assert message_of(GOOD + text).startswith(expected)


def test_tasks_are_saved_as_they_are_read(config_of, tmp_path):
    overrides = [
        "task.mixture=[{path: a/chemistry, weight: 2}, addition]",
        "evaluation.tasks=[addition, {path: x.jsonl}]",
    ]
    config = config_of(GOOD + "task: {name: addition}\n", *overrides)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config


def test_tasks_and_their_overrides(config_of):
    config = config_of(GOOD + "task:\n  mixture:\n  - {path: data/chemistry, weight: 2}\n  - addition\n")
    assert [(source.name, source.weight) for source in config.task.sources] == [
        ("chemistry", 2),
        ("addition", 1),
    ]
    config = config_of(GOOD, "task.path=data/physics", "task.rule=strict")
    assert (config.task.name, config.task.rule) == ("physics", "strict")
    config = config_of(
        GOOD,
        "task.name=math",
        "task.path=x.jsonl",
        "hf_path=other",
        "evaluation.tasks=[addition, {path: aime24.jsonl}]",
    )
    assert config.task.name == "math" and str(config.model.hf_path) == "other"
    assert [(source.name, source.test_share) for source in config.evaluation_tasks] == [
        ("addition", None),
        ("aime24", 1.0),
    ]


# ---- files
# -----------------------------------------------------------------------------------------------------------
