"""Test the commands sample, inspect and config, and a replay of sampled rollouts."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console
from samples import sample_rows
from small_run import QUICKSTART, small_config, small_run

from megatron_srpo.algorithm import METHODS
from megatron_srpo.commands.config import PAPER, check, keys
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.engines import ENGINE_SECTIONS
from megatron_srpo.config.schema import Config
from megatron_srpo.data.rollout_file import step_file
from megatron_srpo.observe.inspect import inspect, visible
from megatron_srpo.observe.tokens import read_tokens
from megatron_srpo.sampling import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train one step and return the run's folder."""
    path = tmp_path_factory.mktemp("run") / "run"
    small_run(path, "train.steps=1")
    return path


def shown(run, step, number):
    """Return what inspect prints."""
    console = Console(file=io.StringIO(), width=80)
    inspect(run, step, number, console)
    return console.file.getvalue()


def test_inspect_shows_a_sample_token_by_token(run):
    rows = sample_rows(step_file(run, 1))
    values = dict(read_tokens(run, 1))
    number = next(
        n
        for n, row in enumerate(rows)
        if row["route"]["sibling"] is not None and (row["prompt"]["id"], row["index"]) in values
    )
    row, text = rows[number], shown(run, 1, number)
    assert (
        row["prompt"]["messages"][0]["content"] in text and f"ground truth: {row['prompt']['answer']}" in text
    )
    assert (
        "route sdpo" in text
        and "sibling shown to its teacher" in text
        and "Correctly solve the original question." in text
    )
    found = values[row["prompt"]["id"], row["index"]]
    assert (
        text.count("    student  ")
        == text.count("    teacher  ")
        == len(found["tokens"])
        == len(row["response_ids"])
    )
    assert f"divergence {found['divergence'][0]:.3g}" in text


def test_inspect_lists_a_step(run):
    lines = shown(run, 1, None).splitlines()
    assert len(lines) == 1 + 32 and lines[1].split()[0] == "0"
    assert sum("tokens" in line for line in lines[1:]) == 8


@pytest.mark.parametrize(
    ("step", "number", "said"), [(9, 0, "steps with samples: 1 … 1"), (1, 32, "samples 0 to 31")]
)
def test_inspect_refuses(run, step, number, said):
    with pytest.raises(ConfigError, match=said):
        shown(run, step, number)


def test_control_characters_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\u202ec\x07\n\ud800") == "a⟨U+001B⟩[2Jb⟨U+202E⟩c⟨U+0007⟩\n⟨U+D800⟩"


def test_what_was_sampled_can_be_trained_on(run, tmp_path):
    # Sampling with the start model gives a run's first samples; replaying them gives its update.
    sample(small_config(tmp_path / "sampled", "train.steps=2"))
    assert step_file(tmp_path / "sampled", 1).read_bytes() == step_file(run, 1).read_bytes()
    assert not list((tmp_path / "sampled" / "ledger").glob("step_*"))  # the dumps contain everything
    assert step_file(tmp_path / "sampled", 2).is_file() and not (tmp_path / "sampled" / "hf").exists()
    (first,) = small_run(tmp_path / "replayed", "train.steps=1", f"rollout.replay={tmp_path / 'sampled'}")
    trained = json.loads((run / "metrics.jsonl").read_text())
    assert [first[key] for key in ("loss", "grad_norm", "pass_rate")] == [
        trained[key] for key in ("loss", "grad_norm", "pass_rate")
    ]
    with pytest.raises(ConfigError, match="already holds a run"):
        sample(small_config(tmp_path / "sampled"))
    with pytest.raises(ConfigError, match="of the sample command; name another folder"):
        small_run(tmp_path / "sampled")


def test_config_explains_every_key():
    found = {key.name: key for key in keys()}
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    servers = {f"rollout.{name}": engine for name, engine in ENGINE_SECTIONS.items()}
    sections |= servers
    every = {f"{section}.{name}" for section, model in sections.items() for name in model.model_fields}
    assert every - set(servers) <= set(found) and not set(servers) & set(found)
    assert found["task.mixture"].type.startswith("list of {name, path, verifier, ")
    assert set(PAPER) <= set(found)
    rates = ", ".join(f"{name}: {method().lr}" for name, method in METHODS.items())
    assert found["algorithm.lr"].default == rates and found["algorithm.name"].default == "srpo"
    assert found["rollout.top_p"][1:3] == ("number", "1.0") and found["train.steps"].default == "required"
    assert (
        found["teacher.kind"].type == "ema | frozen | live | trust_region"
        and found["teacher.ema_rate"].paper == "SRPO §4.1"
    )
    logging = [key for key in found.values() if key.name.startswith("logging.")]
    assert all(key.help for key in logging)


def test_check_finds_what_a_run_would(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    overrides = [f"model.hf_path={QUICKSTART / 'start'}", f"logging.dir={tmp_path / 'new'}"]
    said = check(QUICKSTART / "config.yaml", [*overrides, "parallel.tensor_model_parallel_size=2"], None)
    assert (
        "can be run: srpo on start, 30 steps of 16 × 8 samples, 2 processes" in said
        and not (tmp_path / "new").exists()
    )
    for wrong, message in (
        ("teacher.kind=frosen", "teacher.kind"),
        ("rollout.max_prompt_tokens=5", "raise it"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(QUICKSTART / "config.yaml", [*overrides, wrong], None)
    with pytest.raises(ConfigError, match="--processes: 0; expected 1 or more"):
        check(QUICKSTART / "config.yaml", overrides, 0)
    with pytest.raises(ConfigError, match="does not divide the 3 processes"):
        check(QUICKSTART / "config.yaml", [*overrides, "parallel.tensor_model_parallel_size=2"], 3)


def test_the_docs_explain_every_metric(run):
    # In the first column of its table, `a_b`, `_c` abbreviates a_b and a_b_c or a_c.
    page = (QUICKSTART.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set()
    for line in page.split("## Every metric")[1].split("\n## ")[0].splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        for name in names:
            explained |= (
                {names[0] + name, names[0].rpartition("_")[0] + name} if name.startswith("_") else {name}
            )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys_of_rows = {key for key in rows[0] if not key.startswith("seconds_")} - {"step", "alarms"}
    assert keys_of_rows - explained == set() and "seconds_<phase>" in explained
