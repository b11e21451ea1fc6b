"""Test question files: refusals and their messages, epochs, splits."""

from __future__ import annotations

import json

import pytest
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.tasks import create_task
from megatron_srpo.tasks.question_index import read_questions

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'


def rows(count, start=0):
    return "".join(
        json.dumps({"id": f"q{n}", "question": f"{n}?", "answer": str(n)}) + "\n"
        for n in range(start, start + count)
    )


@pytest.fixture
def refusal(tmp_path):
    """Return a function of the file's bytes that gives the ConfigError's text from the file's name on."""

    def read(content: bytes) -> str:
        file = tmp_path / "data.jsonl"
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_questions(file)
        assert str(caught.value).startswith("task.path: ")
        return str(caught.value).replace(f"{tmp_path}/", "").removeprefix("task.path: ")

    return read


@each_row(
    "content, said",
    [
        (b"", "data.jsonl: is empty; expected one question a line (JSONL)"),
        (b"\n \n", "data.jsonl: is empty; expected one question a line (JSONL)"),
        (
            GOOD + b'{"question": "x"}\n',
            "data.jsonl:2: answer: is missing; expected the right answer, a string or a number",
        ),
        (
            GOOD + b'{"question": "x", "answer": ""}\n',
            "data.jsonl:2: answer: is missing; expected the right answer, a string or a number",
        ),
        (
            GOOD + b'\n{"answer": "x"}\n',
            "data.jsonl:3: question: is missing or empty; expected messages, or question (or prompt) as a"
            " string",
        ),
        (
            b'{"question": "x", "answer": "1", "id": 7}\n{"question": "y", "answer": "1", "id": "7"}\n',
            "data.jsonl:2: id: '7' is also in line 1; ids must be unique",
        ),
        (
            b'{"question": "x", "answer": "1", "id": [1]}\n',
            "data.jsonl:1: id: is [1]; expected a string or an integer",
        ),
        (
            b'{"question": "x", "answer": "1", "feedback": 3}\n',
            "data.jsonl:1: feedback: is 3; expected a string",
        ),
        (
            b'{"question": "x", "answer": "\\ud800"}\n',
            "data.jsonl:1: holds half a surrogate pair ('\\ud800')",
        ),
        (GOOD + b'{"question": "caf\xe9"}\n', "data.jsonl:2: byte 18 is not UTF-8; expected a UTF-8 file"),
        (b"[1, 2]\n", "data.jsonl:1: is a JSON list; expected an object with question and answer"),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}\n',
            "data.jsonl:1: messages: expected system messages, if any, and one user message at the end",
        ),
        (
            b'{"messages": ["x"], "answer": "1"}\n',
            'data.jsonl:1: messages: expected a list of {"role": …, "content": …}, both strings',
        ),
        (
            b'{"prompt": "x", "system": 3, "answer": "1"}\n',
            "data.jsonl:1: system: is 3; expected a string or null",
        ),
    ],
)
def test_refusals_name_file_line_and_field(refusal, content, said):
    assert refusal(content) == said


@each_row(
    "line", [b"{", b"question: x", b'{"question": ' + b"[" * 100_000, b'{"answer": ' + b"9" * 5000 + b"}"]
)
def test_lines_that_are_not_json(refusal, line):
    assert refusal(GOOD + line + b"\n").startswith("data.jsonl:2: is not JSON (")


def test_a_huge_line_is_refused_without_being_read_completely(tmp_path):
    # 100 MB without a line end, most of it a hole in the file: refused after the limit.
    file = tmp_path / "data.jsonl"
    with file.open("wb") as out:
        out.write(GOOD + b'{"question": "')
        out.truncate(100_000_000)
    with pytest.raises(
        ConfigError, match=r"data\.jsonl:2: is longer than 16 MiB; expected one question a line"
    ):
        read_questions(file)


def test_missing_file_and_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.jsonl: cannot be read: No such file"):
        read_questions(tmp_path / "no.jsonl")
    for path in ("no.jsonl", "nothing"):
        with pytest.raises(ConfigError, match="task.path"):
            create_task(TaskSource(name="math", path=tmp_path / path, verifier="exact"), 1)
    with pytest.raises(ConfigError, match="has neither train.jsonl nor test.jsonl"):
        create_task(TaskSource(name="x", path=tmp_path, verifier="exact"), 1)


def test_accepted_shapes(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"question": "2 + 2?", "answer": 4, "level": "easy"}\r\n\n'
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "answer": "x",'
        ' "feedback": "no: y"}\n'
        '{"prompt": "P", "system": null, "idx": 4046, "answer": [{"Action": "é"}], "kind": "tooluse"}'
    )
    first, second, third = read_questions(file, phrase=lambda text: f"Q: {text}")
    assert first == ("1", ({"role": "user", "content": "Q: 2 + 2?"},), "4", None)
    assert (
        second[0] == "3"
        and [message["content"] for message in second[1]] == ["S", "U"]
        and second[3] == "no: y"
    )
    assert third == ("4046", ({"role": "user", "content": "P"},), '[{"Action": "é"}]', None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(rows(20))
    (tmp_path / "test.jsonl").write_text(rows(5, 100))
    return tmp_path


def ids(task, split, numbers):
    return [task.prompt(split, number).id for number in numbers]


def test_every_question_once_an_epoch_by_seed_alone(folder):
    task = create_task(TaskSource(name="mine", path=folder, verifier="exact"), 3)
    seen = ids(task, "train", range(60))
    assert len(set(seen)) == 60
    epochs = [[name.rpartition("/")[2] for name in seen[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(f"q{n}" for n in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # each in an order of its own
    assert seen[25].startswith("mine/train/1/q")
    again = create_task(TaskSource(name="mine", path=folder, verifier="exact"), 3)
    assert ids(again, "train", [59, 3, 41]) == [seen[59], seen[3], seen[41]]
    other = create_task(TaskSource(name="mine", path=folder, verifier="exact"), 4)
    assert ids(other, "train", range(20)) != seen[:20]


def test_test_questions_keep_their_order_and_end(folder):
    task = create_task(TaskSource(name="mine", path=folder, verifier="exact"), 3)
    assert (task.size("train"), task.size("validation"), task.size("test")) == (20, 0, 5)
    assert ids(task, "test", range(5)) == [f"mine/test/q{n}" for n in range(100, 105)]
    with pytest.raises(IndexError):
        task.prompt("test", 5)


def test_held_out_questions(folder, tmp_path):
    # validation_share is taken out of the training set; a validation.jsonl takes precedence; the seed does
    # not matter.
    parts = []
    for seed in (1, 2):
        task = create_task(
            TaskSource(name="mine", path=folder, verifier="exact", validation_share=0.25), seed
        )
        assert (task.size("train"), task.size("validation")) == (15, 5)
        parts.append({name.rpartition("/")[2] for name in ids(task, "validation", range(5))})
        trained = {name.rpartition("/")[2] for name in ids(task, "train", range(15))}
        assert not parts[-1] & trained and len(parts[-1] | trained) == 20
    assert parts[0] == parts[1]
    (folder / "validation.jsonl").write_text(rows(3, 200))
    task = create_task(TaskSource(name="mine", path=folder, verifier="exact", validation_share=0.25), 1)
    assert (task.size("train"), task.size("validation")) == (20, 3)


def test_one_file_is_divided(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(rows(50))
    for share, sizes in ((None, (45, 5)), (0.0, (50, 0)), (1.0, (0, 50)), (0.5, (25, 25))):
        task = create_task(TaskSource(name="mine", path=file, verifier="exact", test_share=share), 1)
        assert (task.size("train"), task.size("test")) == sizes


FOUR = "Which?\nA: 1\nB: 2\nC: 3\nD: 4\nPlease reason step by step."
TWO = "Which?\nA: 1\nB: 2\nPlease reason step by step."


@each_row(
    "verifier, rule, question, answer, said",
    [
        ("multiple_choice", "paper", FOUR, "b", "is 'b'; expected the letter of an option: A, B, C, D"),
        ("multiple_choice", "paper", FOUR, "B.", "is 'B.'; expected the letter"),
        ("multiple_choice", "paper", FOUR, "E", "is 'E'; expected the letter of an option: A, B, C, D"),
        ("multiple_choice", "paper", TWO, "C", "is 'C'; expected the letter of an option: A, B"),
        ("multiple_choice", "strict", "Which?", "AB", "is 'AB'; expected the letter"),
        ("math", "paper", "Q", "2 + 3 = 5\n#### 5", "expected the short answer (tools/prepare_math.py)"),
        ("math", "paper", "Q", ["3", "5"], "is the list"),
        ("tool_calls", "paper", "Q", '[{"Action": "a", "Action_Input": "{"}]', "is not a list of calls"),
        ("tool_calls", "paper", "Q", "call a", "is not a list of calls"),
        ("tool_calls", "strict", "Q", [], "which no response can match"),
        ("tool_calls", "paper", "Q", [{"Action": "a\nb", "Action_Input": {}}], "which no response can match"),
        ("exact", "paper", "Q", "<answer>a", "expected a text that an <answer> block can hold"),
        ("exact", "paper", "Q", float("nan"), "is nan; expected the right answer"),
    ],
)
def test_golds_that_no_answer_can_match_are_refused(tmp_path, verifier, rule, question, answer, said):
    pytest.importorskip("math_verify")
    file = tmp_path / "data.jsonl"
    good = {"multiple_choice": "B", "tool_calls": [{"Action": "a", "Action_Input": {}}]}.get(verifier, "1")
    lines = [{"question": "Q", "answer": good}, {"question": question, "answer": answer}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError) as caught:
        create_task(TaskSource(name="mine", path=file, verifier=verifier, rule=rule), 1)
    assert str(caught.value).startswith(f"task.path: {file}:2: answer: ") and said in str(caught.value)


def test_optional_calls_are_no_faults_of_the_data(tmp_path):
    file = tmp_path / "data.jsonl"
    calls = [{"Action": "[Optional]a", "Action_Input": {}}, {"Action": "b", "Action_Input": '{"n": 1}'}]
    file.write_text(json.dumps({"question": "Q", "answer": calls}) + "\n")
    for rule in ("paper", "strict"):
        create_task(TaskSource(name="mine", path=file, verifier="tool_calls", rule=rule), 1)


def test_numbers_keep_their_spelling_and_trailing_blanks_are_removed(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = ['"answer": 0.00001', '"answer": "B \\n"', '"answer": 1e5', '"answer": 4', '"answer": 2.50']
    file.write_text("".join(f'{{"question": "Q", {line}}}\n' for line in lines))
    answers = [question.answer for question in read_questions(file)]
    assert answers == ["0.00001", "B", "1e5", "4", "2.50"]
