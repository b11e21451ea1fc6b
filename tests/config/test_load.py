"""Test reading the file and the overrides: invalid files, and precedence."""

import itertools
import os
import re

import pytest
import yaml
from good_config import GOOD
from tables import each_row
from time_limit import time_limit

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.config.schema import Config


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml", [])


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, [])


@each_row("text", ["train: [1, 2\n", "train:\n\tsteps: 1\n", "a: b: c\n", "train: @x\n"])
def test_not_yaml(message_of, text):
    assert re.match(
        r"config\.yaml:[12]: is not valid YAML: .*; expected key: value, indented", message_of(text)
    )


@each_row("text", ["model: &m\n  hf_path: *m\n", "train: &t {<<: *t}\n", "? [a, b]\n: 1\n"])
def test_yaml_that_is_no_tree(message_of, text):
    assert re.match(r"config\.yaml(:\d: is not valid YAML: |: is nested without end)", message_of(text))


def test_not_utf8(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"train:\n  steps: \xff\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(file, [])


@each_row("text", ["", "# nothing\n", "- model\n", "just words\n"])
def test_no_sections(message_of, text):
    assert message_of(text) == "config.yaml: expected sections (model:, train:, …) at the top level"


@each_row(
    "text, expected",
    [
        (
            GOOD + "train:\n  steps: 4\n",
            "config.yaml:7: train: given twice, first at config.yaml:3; remove one",
        ),
        (
            GOOD.replace("  steps: 3\n", "  steps: 3\n  seed: 1\n  steps: 4\n"),
            "config.yaml:6: train.steps: given twice, first at config.yaml:4; remove one",
        ),
        (
            GOOD + "megatron:\n  a: 1\n  a: 1\n",
            "config.yaml:9: megatron.a: given twice, first at config.yaml:8; remove one",
        ),
    ],
)
def test_repeated_key(message_of, text, expected):
    assert message_of(text) == expected


def test_section_that_is_no_section(message_of):
    assert message_of(GOOD + "rollout: 5\n").startswith("config.yaml:7: rollout: ")


@each_row("text", [GOOD + "1: x\n", GOOD + "null: x\n", GOOD + "rollout:\n  2: x\n"])
def test_keys_that_are_no_words(message_of, text):
    assert message_of(text).startswith("config.yaml:")


# ---- overrides
# -------------------------------------------------------------------------------------------------------


def test_overrides_replace_the_file_and_are_yaml(config_of):
    config = config_of(
        GOOD,
        "train.steps=7",
        "train.steps=9",
        "parallel.use_distributed_optimizer=false",
        "algorithm.dual_clip=null",
        "logging.dir=a=b",
        "megatron={recompute_granularity: full}",
        "rollout={prompts_per_step: 4, samples_per_prompt: 2}",
    )
    assert config.train.steps == 9
    assert config.parallel.use_distributed_optimizer is False
    assert config.algorithm.dual_clip is None
    assert str(config.logging.dir) == "a=b"
    assert config.megatron == {"recompute_granularity": "full"}
    assert config.rollout.prompts_per_step == 4


def test_override_into_an_absent_section(config_of):
    assert config_of(GOOD, "teacher.kind=frozen").teacher.kind == "frozen"
    assert config_of(GOOD, "megatron.recompute_granularity=full").megatron == {
        "recompute_granularity": "full"
    }


@each_row(
    "override, expected",
    [
        ("train.steps", "override 'train.steps': expected section.key=value"),
        ("train.stps=4", "override 'train.stps=4': train.stps: unknown key; did you mean steps?"),
        ("tain.steps=4", "tain: unknown key; did you mean train?"),
        ("train.steps.more=4", "override 'train.steps.more=4': steps is not a section"),
        ("train.steps=[1", "override 'train.steps=[1': the value is not YAML"),
        ("steps=4", "override 'steps=4': steps: unknown key; did you mean train.steps?"),
        # lr=1e-4 was an unknown key, though hf_path= works without its section
        ("lr=1e-4", "override 'lr=1e-4': lr: unknown key; did you mean algorithm.lr or optimizer.lr?"),
        ("train.lr=1e-4", "train.lr: unknown key; did you mean algorithm.lr or optimizer.lr?"),
        (
            "temprature=2",
            "temprature: unknown key; did you mean rollout.temperature or evaluation.temperature?",
        ),
        (
            "algorithm.name=sprpo",
            "override 'algorithm.name=sprpo': algorithm.name: unknown algorithm 'sprpo'; did you mean srpo?",
        ),
        ("=4", "override '=4': "),
    ],
)
def test_bad_overrides(message_of, override, expected):
    assert expected in message_of(GOOD, override)


@each_row(
    "override, expected",
    [
        (
            "logging.profile_steps=[3]",
            "override 'logging.profile_steps=[3]': logging.profile_steps.1: is required",
        ),
        (
            "logging.profile_steps=[3, 1]",
            "override 'logging.profile_steps=[3, 1]': logging.profile_steps: [3, 1]: expected",
        ),
        ("logging={dur: x}", "override 'logging={dur: x}': logging.dur: unknown key"),
    ],
)
def test_an_override_is_named_before_the_files_section(message_of, override, expected):
    # The file has the section, but not this value.
    assert any(line.startswith(expected) for line in message_of(GOOD, override).splitlines())


def test_unknown_section_by_override_names_the_override(message_of):
    assert message_of(GOOD, "tain.steps=4").startswith("override 'tain.steps=4': ")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in itertools.pairwise("abcdefghi")
)


MAPPINGS = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'{key}: *{before}' for key in 'klmnopqrst')}}}\n"
    for before, name in itertools.pairwise("abcdefghi")
)


@each_row(
    "text",
    [
        BOMB,  # 10⁹ values
        MAPPINGS,
        GOOD + "megatron: {" + ", ".join(BOMB.splitlines()) + "}\n",
        "x: &a {k: v}\n"
        + "".join(
            f"x{n}: &{b} {{<<: [{', '.join([f'*{a}'] * 30)}]}}\n"
            for n, (a, b) in enumerate(itertools.pairwise("abcdefg"))
        ),
        "task: " + "[" * 400 + "]" * 400 + "\n",
    ],
)
def test_yaml_alias_bombs(message_of, text):
    # A few lines whose aliases stand for 10⁹ values took all memory.
    with time_limit(10):
        assert len(message_of(text)) < 600


def test_yaml_alias_bomb_by_override(message_of):
    with time_limit(10):
        override = "megatron={" + ", ".join(BOMB.splitlines()) + "}"
        assert "values, expected a configuration of at most 100,000" in message_of(GOOD, override)


def test_aliases_of_ordinary_size(config_of):
    config = config_of(
        GOOD + "task: {mixture: [{path: a.jsonl, options: &o {x: 1}}, {path: b.jsonl, options: *o}]}\n"
    )
    assert [source.options for source in config.task.sources] == [{"x": 1}] * 2


def test_pipe_instead_of_file(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with time_limit(10), pytest.raises(ConfigError, match="is not a regular file; expected a YAML file"):
        load_config(tmp_path / "config.yaml", [])


@each_row(
    "text, overrides, name",
    [
        # task.path alone kept the file's task.name: addition for everything
        ("task: {name: addition}\n", ["task.path=data/mine.jsonl"], "mine"),
        ("task: {name: reasoning_gym/maze}\n", ["task.path=data/mine"], "mine"),
        ("task: {name: addition}\n", ["task.path=x.jsonl", "task.name=math"], "math"),
        ("task: {name: addition}\n", ["task.name=math", "task.path=x.jsonl"], "math"),
        ("task: {name: addition}\n", ["task={name: math, path: x.jsonl}"], "math"),
        ("task: {name: chemistry, path: data/chemistry}\n", ["task.path=elsewhere/set1"], "chemistry"),
        ("task: {name: addition, path: x.jsonl}\n", [], "addition"),
        ("", ["task.path=data/mine.py"], "mine"),
        ("task: {name: addition}\n", ["task.path=null"], "addition"),
    ],
)
def test_a_name_belongs_to_the_questions_it_was_given_for(config_of, text, overrides, name):
    assert config_of(GOOD + text, *overrides).task.name == name


# ---- what is saved
# ---------------------------------------------------------------------------------------------------


@each_row(
    "overrides",
    [
        [],
        ["algorithm.name=grpo", "optimizer.lr=1e-6"],
        [
            "algorithm.name=advantage_mix",
            "algorithm.mix_lambda=0.3",
            "algorithm.dual_clip=null",
            "rollout.replay=some/where",
        ],
        [
            "algorithm.name=sdpo",
            "megatron={recompute_granularity: full, recompute_num_layers: 1}",
            "logging.dir=läufe/日本",
        ],
    ],
)
def test_saved_config_loads_again(config_of, tmp_path, overrides):
    config = config_of(GOOD, *overrides)
    file = tmp_path / "saved.yaml"
    save_config(config, file)
    assert load_config(file, []) == config
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert set(saved) == set(Config.model_fields)  # every default spelled out
    assert set(saved["algorithm"]) == set(type(config.algorithm).model_fields)
