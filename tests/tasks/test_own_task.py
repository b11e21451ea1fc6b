"""Test a user's own task: epochs of a finite one, and errors of its code in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.tasks import create_task

FINITE = """\
from megatron_srpo.data.records import Prompt, Verdict

WORDS = ["ka", "lo", "mi", "ne", "ru"]


class Words:
    def __init__(self, name, seed):
        self.name = name

    def size(self, split):
        return {"train": len(WORDS), "test": 2}.get(split, 0)

    def prompt(self, split, index):
        word = WORDS[index]
        messages = ({"role": "user", "content": word},)
        return Prompt(id=f"{split}/{index}", task="words", messages=messages, answer=word)

    @staticmethod
    def verify(answer, text):
        return Verdict(reward=0.0, correct=False, format_ok=True)
"""


@pytest.fixture
def make(tmp_path):
    """Return a function that writes the code and creates its task with a seed."""

    def create(code=FINITE, seed=1, name="words"):
        file = tmp_path / "words.py"
        file.write_text(code)
        return create_task(TaskSource(path=Path(file), name=name), seed)

    return create


def test_a_finite_own_task_starts_new_epochs_in_new_orders(make):
    # Row: a finite own task dies at the end of its first epoch with a bare IndexError.
    task = make()
    prompts = [task.prompt("train", number) for number in range(20)]
    epochs = [[prompt.answer for prompt in prompts[start : start + 5]] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == ["ka", "lo", "mi", "ne", "ru"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # reshuffled
    assert len({prompt.id for prompt in prompts}) == 20  # unique in a run, also across epochs
    assert [make().prompt("train", number) for number in range(20)] == prompts  # a function of the seed
    other = make(seed=2)
    assert [other.prompt("train", number).answer for number in range(20)] != sum(epochs, [])
    assert [task.prompt("test", number).answer for number in range(2)] == ["ka", "lo"]  # in its order


def test_prompts_belong_to_the_task_under_its_name(make):
    assert make(name="mine").prompt("train", 0).task == "mine"  # the verifier is found by it


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("len(WORDS), ", "len(WORDS) + 1, ", ":14: prompt('train', 5) raised IndexError: list index out of"),
        ('"test": 2', '"test": 9', ":14: prompt('test', 8) raised IndexError"),
        ('"test": 2', '"validation": 6', ":14: prompt('validation', 5) raised IndexError"),
        (
            "WORDS[index]",
            "WORDS[index - 1 / 0]",
            ":14: prompt('train', 0) raised ZeroDivisionError",
        ),
        ("return Prompt(", "return dict(", ": prompt('train', 0) returned {'id': 'train/0', "),
        ("return {", "return 2.5 or {", ": size('train') returned 2.5, expected the number of prompts"),
        ("return {", "return -1 or {", ": size('train') returned -1, expected the number of prompts"),
        ("return {", "return True or {", ": size('train') returned True, expected the number of prompts"),
        ("return {", "return nothing or {", ":11: size('train') raised NameError: name 'nothing' is not"),
        ("def size(", "def length(", ": size('train') raised AttributeError"),
        (
            "self.name = name",
            "self.name = NAME",
            ":8: Words cannot be created with {}: NameError",
        ),
        ("WORDS = [", "WORDS = [1 / 0, ", ":3: cannot be run: ZeroDivisionError: division by zero"),
        ("class Words:", "class Words", ":6: cannot be run: SyntaxError: expected ':'"),
    ],
)
def test_errors_of_the_users_code_are_one_sentence_with_file_and_line(make, tmp_path, old, new, said):
    # Both ends of every split are asked for at the start, so the run does not find the last one after a day.
    assert old in FINITE
    with pytest.raises(ConfigError) as caught:
        make(FINITE.replace(old, new))
    text = str(caught.value)
    assert f"{tmp_path / 'words.py'}{said}" in text and "\n" not in text


def test_an_error_in_the_middle_of_an_epoch_is_named_too(make):
    task = make(FINITE.replace("word = WORDS[index]", "word = WORDS[index] if index != 2 else None.word"))
    with pytest.raises(ConfigError, match=r"task words: .*words.py:14: prompt\('train', 2\) raised Attr"):
        for number in range(5):
            task.prompt("train", number)
