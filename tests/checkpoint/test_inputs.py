"""Test the refusal of changed inputs: data, task code, tokenizer, chat template. No run is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_srpo.checkpoint.inputs import check_inputs, inputs_of
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import FolderError, HFFolder

ROOT = Path(__file__).parents[2]
OWN = """\
from pathlib import Path

from megatron_srpo.data.records import Prompt, Verdict

WORDS = Path(__file__).with_name("words.txt").read_text().split()


class Words:
    def __init__(self, name, seed, hints=None):
        self.name = name

    def size(self, split):
        return len(WORDS)

    def prompt(self, split, index):
        messages = ({"role": "user", "content": WORDS[index]},)
        return Prompt(id=f"{split}/{index}", task=self.name, messages=messages, answer="x")

    @staticmethod
    def verify(answer, text):
        return Verdict(reward=0.0, correct=False, format_ok=True)
"""


@pytest.fixture
def inputs(tmp_path):
    """Return a function of overrides that computes the inputs, with a model folder in tmp_path/model."""
    shutil.copytree(ROOT / "examples/quickstart/start", tmp_path / "model")

    def compute(*overrides):
        settings = [f"model.hf_path={tmp_path / 'model'}", f"logging.dir={tmp_path / 'run'}", *overrides]
        config = load_config(ROOT / "examples/quickstart/config.yaml", settings)
        return inputs_of(config, HFFolder(config.model.hf_path))

    return compute


def refusal(saved, now, *allowed):
    with pytest.raises(ConfigError) as caught:
        check_inputs(saved, now, allowed, "logging.dir: run")
    return str(caught.value)


def questions(file, answer="4"):
    file.parent.mkdir(exist_ok=True)
    rows = [{"question": f"What is {n} + 2?", "answer": answer if n == 2 else str(n + 2)} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("changed", ["train", "test", "validation"])
def test_a_changed_question_file_is_refused_by_name(inputs, tmp_path, changed):
    # Rows: a changed question file is accepted at resume; resume trains on other data without a word.
    for split in ("train", "test"):
        questions(tmp_path / "data" / f"{split}.jsonl")
    task = [f"task.path={tmp_path / 'data'}", "task.name=sums", "task.verifier=exact"]
    saved = inputs(*task)
    check_inputs(saved, inputs(*task), (), "logging.dir: run")
    questions(tmp_path / "data" / f"{changed}.jsonl", answer="5")  # the same size, one character
    now = inputs(*task)
    text = refusal(saved, now)
    assert f"task.path: {tmp_path / 'data' / changed}.jsonl is not what it was" in text
    assert "add task.path to resume.override" in text
    check_inputs(saved, now, ("task",), "logging.dir: run")  # the user decides
    check_inputs(saved, now, ("task.path",), "logging.dir: run")
    assert refusal(saved, now, "model", "task.name")


def test_one_file_and_a_mixtures_file_are_named_too(inputs, tmp_path):
    file = tmp_path / "data" / "all.jsonl"
    questions(file)
    source = f"{{path: {file}, name: sums, verifier: exact}}"
    for task in ([f"task={source}"], [f"task={{mixture: [addition, {source}]}}"]):
        questions(file)
        saved = inputs(*task)
        questions(file, answer="5")
        key = "task.mixture" if "{mixture:" in task[0] else "task.path"
        assert f"{key}: {file} is not what it was" in refusal(saved, inputs(*task))


@pytest.mark.parametrize("changed", ["code", "module beside it", "its data", "a file of its options"])
def test_changed_code_and_data_of_an_own_task_are_refused_by_name(
    inputs, tmp_path, monkeypatch, changed, request
):
    # Row: a changed task file is accepted at resume silently.
    name = f"beside_{abs(hash(request.node.name)) % 10**9}"  # of a module that no other test has imported
    monkeypatch.syspath_prepend(tmp_path / "own")
    files = {
        "code": tmp_path / "own" / "own.py",
        "module beside it": tmp_path / "own" / f"{name}.py",
        "its data": tmp_path / "own" / "words.txt",
        "a file of its options": tmp_path / "hints.txt",
    }
    (tmp_path / "own").mkdir()
    files["code"].write_text(f"from {name} import ONE\n" + OWN)
    files["module beside it"].write_text("class ONE:\n    x = 1\n")
    files["its data"].write_text("red green blue\n")
    files["a file of its options"].write_text("a\n")
    task = f"task={{path: {files['code']}, options: {{hints: {files['a file of its options']}}}}}"
    saved = inputs(task)
    check_inputs(saved, inputs(task), (), "logging.dir: run")
    files[changed].write_text(files[changed].read_text().replace("green", "brown") + "# more\n")
    text = refusal(saved, inputs(task))
    expected = "the training prompts of task own" if changed == "its data" else str(files[changed])
    assert f"task.path: {expected} is not what it was" in text


def test_swapped_tokens_and_another_template_are_refused_by_name(inputs, tmp_path):
    # Rows: swapped tokenizer ids; a chat template that has changed.
    saved, model = inputs(), tmp_path / "model"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = refusal(saved, inputs())
    assert "model.hf_path: tokenizer.json is not what it was" in text and "add model.hf_path" in text
    check_inputs(saved, inputs(), ("model",), "logging.dir: run")
    shutil.copy(ROOT / "examples/quickstart/start/tokenizer.json", model / "tokenizer.json")
    check_inputs(saved, inputs(), (), "logging.dir: run")
    template = HFFolder(model).tokenizer.chat_template
    (model / "chat_template.jinja").write_text(template + "{# #} more")
    assert "model.hf_path: the chat template is not what it was" in refusal(saved, inputs())


def test_a_run_of_an_older_version_has_nothing_to_compare(inputs):
    check_inputs({}, inputs(), (), "logging.dir: run")


def test_a_template_with_a_date_gives_the_same_prompt_every_day(tmp_path):
    # Row: a chat template with today's date.
    model = shutil.copytree(ROOT / "examples/quickstart/start", tmp_path / "model")
    template = "{{ strftime_now('%d %m %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    folder = HFFolder(model)
    ids = folder.encode([{"role": "user", "content": " 1"}])
    assert ids == folder.tokenizer("26 07 2024 1", add_special_tokens=False).input_ids
    (model / "chat_template.jinja").write_text("{% set f = '%d' %}" + template + "{{ strftime_now(f) }}")
    with pytest.raises(FolderError, match=r"asks for today's date \(strftime_now\) in a format"):
        HFFolder(model).encode([{"role": "user", "content": " 1"}])
