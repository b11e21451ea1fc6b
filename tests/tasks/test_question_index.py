"""Test the index of a question file: lines are read again, shares are by ids, long prompts are found."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
import unicodedata
import zlib
from types import SimpleNamespace

import pytest
from tables import each_row
from tiny import save_folder

from megatron_srpo import preflight
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.collect import encode_prompt
from megatron_srpo.tasks import create_task, question_index
from megatron_srpo.tasks.question_index import most_tokens, read_questions
from megatron_srpo.tasks.questions import hold_out


def write(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def make_rows(count, seed=0):
    rng = random.Random(seed)
    return [
        {"id": f"q{rng.random()}", "question": "Wörter " * rng.randrange(1, 9), "answer": str(number)}
        for number in range(count)
    ]


def test_questions_are_those_of_the_file(tmp_path):
    rows = make_rows(500)
    questions = read_questions(write(tmp_path / "data.jsonl", rows))
    assert len(questions) == 500
    found = [(one.id, one.messages[0]["content"], one.answer) for one in questions]
    assert found == [(row["id"], row["question"], row["answer"]) for row in rows]
    assert questions[499].answer == "499" and [one.answer for one in questions[3:5]] == ["3", "4"]
    with pytest.raises(IndexError):
        questions[500]


def test_a_million_questions_would_take_64_megabytes(tmp_path):
    rows = [{"id": str(number), "question": "x" * 500, "answer": "1"} for number in range(20_000)]
    file = write(tmp_path / "data.jsonl", rows)
    del rows
    tracemalloc.start()
    questions = read_questions(file)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(questions) == 20_000 and held < 64 * 20_000 and peak < 150 * 20_000


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
def test_held_out_questions_are_those_with_the_smallest_checksums(tmp_path, share, monkeypatch):
    # Against sorting the ids themselves; a checksum of three bits has many ties.
    rows = make_rows(300)
    for checksum in (zlib.crc32, lambda content: zlib.crc32(content) % 8):
        monkeypatch.setattr(question_index, "zlib", SimpleNamespace(crc32=checksum))
        questions = read_questions(write(tmp_path / "data.jsonl", rows))
        ranked = sorted((row["id"] for row in rows), key=lambda name: (checksum(name.encode()), name))
        wanted = set(ranked[: round(share * 300)])
        chosen, others = hold_out(questions, share)
        assert [one.id for one in chosen] == [row["id"] for row in rows if row["id"] in wanted]
        assert [one.id for one in others] == [row["id"] for row in rows if row["id"] not in wanted]
        twice, rest = hold_out(others, 0.5)  # of a part
        order = sorted((one.id for one in others), key=lambda name: (checksum(name.encode()), name))
        assert {one.id for one in twice} == set(order[: round(0.5 * len(others))])
        assert len(twice) + len(rest) == len(others)


def test_the_first_repeated_id_is_named(tmp_path):
    names = ["a", "b", "c", "b", "a", "b"]
    rows = [{"id": name, "question": "Q", "answer": "1"} for name in names]
    with pytest.raises(ConfigError, match=r"data\.jsonl:4: id: 'b' is also in line 2; ids must be unique"):
        read_questions(write(tmp_path / "data.jsonl", rows))


def test_a_file_that_is_written_to_during_a_run_is_refused(tmp_path):
    rows = make_rows(20)
    file = write(tmp_path / "data.jsonl", rows)
    questions = read_questions(file)
    with file.open("a") as out:  # the questions are still there
        out.write(json.dumps({"question": "more", "answer": "1"}) + "\n")
    assert [one.answer for one in questions] == [str(number) for number in range(20)]
    content = file.read_bytes()
    with file.open("r+b") as out:
        out.write(content.replace(b'"7"', b'"8"'))
    assert questions[6].answer == "6"
    with pytest.raises(ConfigError, match=r"data\.jsonl:8: has changed since the file was checked"):
        questions[7]


def test_a_file_that_is_replaced_during_a_run_does_not_matter_to_it(tmp_path):
    file = write(tmp_path / "data.jsonl", make_rows(20))
    questions = read_questions(file)
    os.replace(write(tmp_path / "other.jsonl", make_rows(5, seed=1)), file)
    assert [one.answer for one in questions] == [str(number) for number in range(20)]


def test_a_changed_file_is_read_again(tmp_path):
    file = write(tmp_path / "mine.jsonl", make_rows(20))
    source = TaskSource(name="mine", path=file, verifier="exact", test_share=0.0)
    first = create_task(source, 1)
    assert create_task(source, 1).splits["train"].file is first.splits["train"].file  # one for all tasks
    os.replace(write(tmp_path / "other.jsonl", make_rows(30, seed=1)), file)
    assert (create_task(source, 1).size("train"), first.size("train")) == (30, 20)


@each_row(
    "text",
    ["plain text", "naïve 日本 ½", "ﷺ" * 3, "é" * 5, "e\u0301" * 5, "각" * 4, "क़" * 3, "🙂👩‍👩‍👧", ""],
)
def test_no_normal_form_has_more_bytes_than_the_limit(text):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert len(unicodedata.normalize(form, text).encode()) <= most_tokens(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder whose tokenizer has one token for each byte."""
    return HFFolder(save_folder(tmp_path_factory.mktemp("model")))


def config_of(model, file, limit):
    sections = {
        "model": {"hf_path": model.path},
        "train": {"steps": 1},
        "logging": {"dir": file.parent / "run"},
    }
    sections |= {"rollout": {"max_prompt_tokens": limit}}
    return Config.model_validate(
        {**sections, "task": {"path": file, "name": "mine", "verifier": "exact", "test_share": 0.0}}
    )


def check(config, model, monkeypatch):
    """Check the task's prompts; return how many were tokenized."""
    (task,) = preflight.training_tasks(config).values()
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return encode_prompt(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "encode_prompt", encode)
        patch.setattr(preflight, "_TOKENIZED", 40)
        preflight._check_prompts(config, model, task, "train", task.size("train"))
    return len(calls)


def longest(config, model):
    """Return the tokens of the longest prompt, found by tokenizing all."""
    (task,) = preflight.training_tasks(config).values()
    wide = config.rollout.model_copy(update={"max_prompt_tokens": 10**6})
    prompts = [encode_prompt(task.prompt("train", n), model, wide) for n in range(task.size("train"))]
    return max(len(prompt.ids) for prompt in prompts)


@pytest.mark.parametrize("place", [0, 777, 1999])
def test_the_one_question_that_is_too_long_is_found(tmp_path, model, monkeypatch, place):
    rows = make_rows(2000)
    file = write(tmp_path / "data.jsonl", rows)
    limit = longest(config_of(model, file, 1), model)
    rows[place]["question"] = "x" * (limit - 8)
    config = config_of(model, write(file, rows), limit)
    with pytest.raises(ConfigError) as caught:
        check(config, model, monkeypatch)
    found = f"rollout.max_prompt_tokens: {limit}, but prompt mine/train/0/{rows[place]['id']} has"
    assert str(caught.value).startswith(found)


def test_only_questions_that_may_be_too_long_are_tokenized(tmp_path, model, monkeypatch):
    rows = make_rows(2000)
    file = write(tmp_path / "data.jsonl", rows)
    limit = longest(config_of(model, file, 1), model)
    assert check(config_of(model, file, limit + 1000), model, monkeypatch) < 100
    some = check(config_of(model, file, limit), model, monkeypatch)
    assert 100 < some < 2000
    assert check(config_of(model, write(file, rows[:40]), limit), model, monkeypatch) == 40


def test_all_are_tokenized_if_the_template_repeats_the_question(tmp_path, model, monkeypatch):
    copied = HFFolder(save_folder(tmp_path / "model"))
    copied.tokenizer.chat_template = "{% for m in messages %}{{ m.content * 3 }}{% endfor %}"
    rows = make_rows(2000)
    rows[1234]["question"] = "x" * 300
    config = config_of(copied, write(tmp_path / "data.jsonl", rows), 880)
    with pytest.raises(ConfigError, match=f"prompt mine/train/0/{rows[1234]['id']} has 900 tokens"):
        check(config, copied, monkeypatch)


def test_a_number_of_messages_that_the_template_refuses_is_found(tmp_path, model, monkeypatch):
    copied = HFFolder(save_folder(tmp_path / "model"))
    refusal = "{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}"
    copied.tokenizer.chat_template = refusal + "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = make_rows(2000)
    system = {"role": "system", "content": "S"}
    rows[1234] = {"messages": [system, system, {"role": "user", "content": "Q"}], "answer": "1"}
    config = config_of(copied, write(tmp_path / "data.jsonl", rows), 1000)
    with pytest.raises(ValueError, match="the chat template cannot be applied"):
        check(config, copied, monkeypatch)


def test_progress_is_shown_for_large_files_on_the_first_rank(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "data.jsonl", make_rows(20_000))
    for name, size in (("_LARGE", 1000), ("_SHOWN", 10_000)):
        monkeypatch.setattr(question_index, name, size)
    clock = iter(range(10**6))
    monkeypatch.setattr(
        "megatron_srpo.distributed.byte_progress.time.perf_counter", lambda: next(clock) * 2.0
    )
    read_questions(file)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and all(line.startswith(f"checking {file}: ") for line in lines)
    monkeypatch.setenv("RANK", "1")
    read_questions(file)
    assert capsys.readouterr().err == ""
