"""Test inspect and report on run folders with wrong types and terminal escapes. No run is needed."""

from __future__ import annotations

import io
import json
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console
from samples import make_sample

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.data.records import Route
from megatron_srpo.data.rollout_file import dump, step_file
from megatron_srpo.observe.inspect import inspect
from megatron_srpo.observe.logs import LOG, rank_log
from megatron_srpo.observe.report import report_data
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.observe.tokens import tokens_file, write_tokens

ESCAPE = "\x1b]0;title\x07\x1b[2J\u202e"
CONFIG = "model: {hf_path: none}\ntrain: {steps: 3}\nlogging: {dir: run}\n"


@pytest.fixture
def run(tmp_path):
    """Return a run folder with two steps, an evaluation, two samples and token values of one."""
    (tmp_path / "given.yaml").write_text(CONFIG)
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    save_config(load_config(tmp_path / "given.yaml", []), folder / "config.yaml")
    names = ("pass_rate", "zero_advantage_share", "sdpo_token_share", "updates", "updates_skipped")
    rows = [{"step": step, "loss": 0.1, **dict.fromkeys(names, 0.5), "seconds": 1.0} for step in (1, 2)]
    rows.append({"step": 2, "eval/addition/avg@4": 0.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    route = Route(branch="grpo", policy_weight=1, distillation_weight=0, advantage=0.5)
    group = tuple(make_sample(index, index == 0, "p", text="words", route=route) for index in range(2))
    dump([group], folder / "rollouts", 1)
    values = {"prompt_id": "p", "index": 0, "logprob": [-1.0, None], "top": [[[8, -0.1]], [[9, -0.2]]]}
    write_tokens([{**values, "tokens": [8, 9]}], str, folder, 1)
    return folder


def shown(run, number=None):
    out = io.StringIO()
    inspect(run, 1, number, Console(file=out, width=200, highlight=False))
    return out.getvalue()


SAMPLES, TOKENS, METRICS = "rollouts/step_000001.jsonl", "rollouts/step_000001.tokens.jsonl", "metrics.jsonl"
WRONG = [
    (METRICS, '"step": 2', '"step": "2"'),
    (METRICS, '"seconds": 1.0', '"seconds": "1.0"'),
    (METRICS, '"seconds": 1.0', '"seconds": [1.0]'),
    (METRICS, '"pass_rate": 0.5', '"pass_rate": {}'),
    (METRICS, '"updates": 0.5', '"updates": "many"'),
    (METRICS, '"eval/addition/avg@4": 0.25', '"eval/addition/avg@4": "good"'),
    (METRICS, '"loss": 0.1', '"loss": 1' + "0" * 400),
    (METRICS, '{"step": 1', "[" * 5000 + '{"step": 1'),
    (SAMPLES, '"text": "words"', '"text": 7'),
    (SAMPLES, '"text": "words"', '"text": null'),
    (SAMPLES, '"index": 0', '"index": "first"'),
    (SAMPLES, '"reward": 1.0', '"reward": "high"'),
    (SAMPLES, '"advantage": 0.5', '"advantage": []'),
    (SAMPLES, '"branch": "grpo"', '"branch": 3'),
    (SAMPLES, '"ids": [5, 6, 7]', '"ids": 5'),
    (SAMPLES, '"role": "user"', '"role": {}'),
    (SAMPLES, '"segments": [', '"segments": ["x", '),
    (SAMPLES, '"verdict": {', '"verdict": null, "old": {'),
    (SAMPLES, '"route": {', '"route": null, "old": {'),
]


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_wrong_types_are_named_and_the_rest_is_shown(run, name, old, new):
    # Row: wrong types in a run's files: 7 tracebacks and 5 blank reports of 22.
    file = run / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    data = report_data([run], 100)
    (note,) = data["notes"]
    number = text[: text.index(old)].count("\n") + 1
    assert note.startswith(f"{file}:{number}: ") and note.endswith("left out")
    json.dumps(data, allow_nan=False)
    assert len(data["samples"]) == (1 if name == SAMPLES else 2)
    kept = [len(data["runs"][0]["hours"]), len(data["runs"][0]["evaluations"])]
    assert sum(kept) == (3 if name == SAMPLES else 2)
    if name == SAMPLES:
        assert f"{name}:1: " in shown(run) and "words" in shown(run, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"tokens": ["[8]"', '"tokens": [8'),
        ('"tokens": [', '"tokens": ["more", '),
        ('"logprob": [', '"logprob": ["a", '),
        ('"logprob": [-1.0', '"logprob": [[]'),
        ('"index": 0', '"index": []'),
        ('"prompt_id": "p"', '"prompt_id": 1'),
        ('"top": [[["[8]"', '"top": [[[8'),
        ('"top": [[["[8]", -0.1]]', '"top": [["x"]'),
    ],
)
def test_wrong_types_of_token_values_are_one_sentence(run, old, new):
    file = tokens_file(run, 1)
    text = file.read_text()
    assert old in text, text
    file.write_text(text.replace(old, new, 1))
    for show in (lambda: report_data([run], 100), lambda: shown(run)):
        with pytest.raises(ConfigError, match=r"tokens.jsonl:1: is damaged .*; remove the file"):
            show()


@pytest.mark.parametrize("place", ["text", "id", "content", "answer", "feedback", "verifier_failed"])
def test_no_escape_reaches_the_terminal(run, place):
    # Row: raw terminal escapes in inspect.
    row = json.loads(step_file(run, 1).read_text().splitlines()[0])
    escaped = {"text": [row], "id": [row["prompt"]], "answer": [row["prompt"]]}
    escaped |= {"content": row["prompt"]["messages"], "feedback": [row["verdict"]]}
    for part in escaped.get(place, [row["verdict"]]):
        part[place] = ESCAPE
    step_file(run, 1).write_text(json.dumps(row) + "\n" + '{"x": "' + ESCAPE + '"}\n')
    for text in (shown(run), shown(run, 0)):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_no_escape_reaches_the_terminal_in_messages_and_logs(tmp_path):
    # Row: raw terminal escapes in messages.
    (tmp_path / "logs").mkdir()
    with Terminal("title", 1, enabled=True) as terminal:
        terminal.console = Console(file=io.StringIO(), width=200)
        terminal.say(f"prompt {ESCAPE} is too long")
        assert "⟨U+001B⟩" in terminal.console.file.getvalue()
        assert "\x1b" not in terminal.console.file.getvalue()
    layout = SimpleNamespace(rank=0, world_size=1, device="cpu")
    with pytest.raises(ValueError), rank_log(tmp_path, layout):
        LOG.log(logging.INFO, "%s", ESCAPE)
        raise ValueError(ESCAPE)
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert text.count("⟨U+001B⟩]0;title⟨U+0007⟩") >= 2 and "\x1b" not in text
