"""Test the tasks that a configuration means: names, paths, own classes, mixtures, evaluation, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.config.task_section import TaskSection, TaskSource
from megatron_srpo.tasks import (
    create_task,
    evaluation_tasks,
    question_count,
    training_tasks,
)
from megatron_srpo.tasks.mixture import Mixture
from megatron_srpo.tasks.pool import Job, Pool
from megatron_srpo.tasks.remarks import evaluation_remarks

ROOT = Path(__file__).parents[2]
OWN = ROOT / "examples/own_task/backwards.py"
LINE = '{{"id": "{0}", "question": "{0}?", "answer": "A"}}\n'


@pytest.fixture
def folder(tmp_path):
    """Write chemistry/ and physics/ with 10 training and 3 test questions each."""
    for name in ("chemistry", "physics"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(LINE.format(n) for n in range(10)))
        (tmp_path / name / "test.jsonl").write_text("".join(LINE.format(n) for n in range(20, 23)))
    return tmp_path


def config_of(**sections) -> Config:
    return Config.model_validate(
        {"model": {"hf_path": "x"}, "train": {"steps": 1}, "logging": {"dir": "y"}, **sections}
    )


def test_a_folder_names_its_task_and_the_name_its_verifier(folder):
    task = create_task(TaskSource(path=folder / "chemistry"), 1)
    assert (task.name, task.verifier) == ("chemistry", "megatron_srpo.tasks.sciknoweval:verify")
    strict = create_task(TaskSource(path=folder / "chemistry", rule="strict"), 1)
    assert strict.verifier == "megatron_srpo.tasks.sciknoweval:verify_strict"
    calls = [{"Action": "a", "Action_Input": {"n": 1.5}}]
    (folder / "physics/train.jsonl").write_text(json.dumps({"question": "Q", "answer": calls}) + "\n")
    (folder / "physics/test.jsonl").unlink()
    named = create_task(TaskSource(name="tool_use", path=folder / "physics"), 1)
    assert named.verifier == "megatron_srpo.tasks.tool_use:verify"


@each_row(
    "given, said",
    [
        ({"name": "sudoku"}, "task.name: unknown task 'sudoku'; known: addition, reasoning_gym/DATASET"),
        ({"name": "chemistry"}, "task.path: chemistry needs its questions"),
        (
            {"path": "physics", "name": "mine"},
            "none for 'mine' in .*physics. Set task.verifier \\(exact, math, multiple_choice, tool_calls",
        ),
        ({"path": "physics", "verifier": "exakt"}, "task.verifier: unknown verifier 'exakt'; known: exact, "),
        ({"path": "physics", "verifier": "exact", "rule": "strict"}, "task.rule: exact has no strict rule"),
        ({"rule": "strict"}, "task.rule: task addition does not read it; is task.path missing\\?"),
        ({"verifier": "math"}, "task.verifier: task addition does not read it"),
        ({"options": {"a": 1}}, "task.options: task addition does not read it"),
        ({"path": "physics", "test_share": 0.5}, "task.test_share: task physics does not read it"),
    ],
)
def test_refusals(folder, given, said):
    if "path" in given:
        given = {**given, "path": folder / given["path"]}
    with pytest.raises(ConfigError, match=said):
        create_task(TaskSource(**given), 1)


# ---- own classes
# -------------------------------------------------------------------------------------------------------


def test_own_class_from_the_example():
    (source,) = TaskSection(path=OWN, options={"syllables": 3}).sources
    task = create_task(source, 5)
    assert (task.name, task.syllables, task.seed) == ("backwards", 3, 5)
    prompt = task.prompt("train", 0)
    word = prompt.messages[0]["content"].split()[1]
    assert prompt.answer == word[::-1] and prompt.task == "backwards"
    assert not {task.prompt("train", n).answer for n in range(200)} & {
        task.prompt("test", n).answer for n in range(200)
    }
    pool = Pool({task.name: task.verifier}, TaskSection(verifier_workers=1))
    right, wrong = pool.verify(
        [Job(task.name, prompt.answer, f" {prompt.answer}."), Job(task.name, prompt.answer, "no")]
    )
    assert right.correct and not wrong.correct and wrong.feedback.startswith("A word of ")


@each_row(
    "code, said",
    [
        ("x = 1 / 0", "cannot be run: ZeroDivisionError"),
        ("def f(", "cannot be run: SyntaxError"),
        ("x = 1", "expected one class with size, prompt and verify, found 0"),
        ("class A:\n def prompt(s): 0\n def verify(s): 0\nclass B(A): pass", "found 2"),
        ("class A:\n def prompt(s): 0\n def verify(s, a, t): 0", "A.verify must be a @staticmethod"),
        ("class A:\n def prompt(s): 0\n @staticmethod\n def verify(a, t): 0", "A cannot be created with {}"),
    ],
)
def test_own_files_that_cannot_be_used(tmp_path, code, said):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ConfigError) as caught:
        create_task(TaskSource(path=file), 1)
    assert said in str(caught.value) and "mine.py" in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist"):
        create_task(TaskSource(path=tmp_path / "none.py"), 1)


# ---- mixtures
# ----------------------------------------------------------------------------------------------------------


def test_mixture_keeps_its_shares_at_every_length(folder):
    config = config_of(
        task={
            "mixture": [
                {"path": folder / "chemistry", "weight": 5},
                {"path": folder / "physics", "weight": 2},
                {"name": "addition"},
            ]
        }
    )
    sources = {source.name: source.weight for source in config.task.sources}
    assert sources == {"chemistry": 5, "physics": 2, "addition": 1}
    mixture = Mixture(training_tasks(config), sources)
    prompts = [mixture.prompt(number) for number in range(400)]
    counts = Counter()
    for number, prompt in enumerate(prompts, 1):
        counts[prompt.task] += 1
        for name, weight in sources.items():
            assert abs(counts[name] - number * weight / 8) < 2
    assert len({prompt.id for prompt in prompts}) == 400
    for name in sources:  # each task's own prompts, in its own order
        own = [prompt.id for prompt in prompts if prompt.task == name]
        assert own == [training_tasks(config)[name].prompt("train", n).id for n in range(len(own))]
    later = Mixture(training_tasks(config), sources)
    assert [later.prompt(number).id for number in (399, 7)] == [prompts[399].id, prompts[7].id]


def test_one_task_is_a_mixture_of_one():
    config = config_of()
    mixture = Mixture(training_tasks(config), {"addition": 1.0})
    assert [mixture.prompt(n).id for n in (0, 5)] == ["addition/train/0", "addition/train/5"]


# ---- what is evaluated
# -------------------------------------------------------------------------------------------------


def test_evaluated_are_the_training_tasks_or_those_named(folder):
    physics = {"path": str(folder / "physics")}
    assert set(evaluation_tasks(config_of())) == {"addition"}
    assert set(evaluation_tasks(config_of(task={"mixture": ["addition", physics]}))) == {
        "addition",
        "physics",
    }
    assert set(
        evaluation_tasks(
            config_of(task={"mixture": ["addition", physics]}, evaluation={"tasks": ["physics"]})
        )
    ) == {"physics"}
    assert set(evaluation_tasks(config_of(evaluation={"tasks": [physics, "addition"]}))) == {
        "physics",
        "addition",
    }


def test_one_file_is_all_test_when_nothing_is_trained_on_it(folder):
    file = folder / "chemistry/train.jsonl"
    config = config_of(evaluation={"tasks": [{"path": file, "verifier": "exact"}], "prompts": None})
    (task,) = evaluation_tasks(config).values()
    assert question_count(task, "test", config.evaluation) == 10
    trained = config_of(task={"path": file, "verifier": "exact"}, evaluation={"prompts": None})
    (task,) = evaluation_tasks(trained).values()
    assert question_count(task, "test", trained.evaluation) == 1
    assert question_count(task, "test", config_of().evaluation) == 1  # 64 were requested


@pytest.mark.parametrize("shares", [{}, {"test_share": 0.3}, {"test_share": 0.3, "validation_share": 0.4}])
def test_what_is_trained_on_is_not_evaluated(folder, shares, monkeypatch):
    # The same file as a training task and in evaluation.tasks, by another spelling of its path and another
    # name.
    monkeypatch.chdir(folder)
    file = {"path": folder / "chemistry/train.jsonl", "verifier": "exact"}
    config = config_of(
        task=file | shares,
        evaluation={
            "tasks": [{"path": "chemistry/train.jsonl", "name": "other", "verifier": "exact"}],
            "splits": ["test"],
        },
    )
    (trained,), (evaluated,) = training_tasks(config).values(), evaluation_tasks(config).values()
    learnt = {question.id for question in trained.splits["train"]}
    for split in ("test", "validation"):
        assert [*evaluated.splits[split]] == [*trained.splits[split]]
        assert not learnt & {question.id for question in evaluated.splits[split]}
    asked = config_of(
        task=file, evaluation={"tasks": [file | {"test_share": 1.0}]}
    )  # an explicit share takes all
    assert [task.size("test") for task in evaluation_tasks(asked).values()] == [10]


def test_trained_test_questions_and_partial_evaluations_are_said(folder):
    # A test question with other blanks is the same; endless tasks have no such questions.
    lines = [{"id": "t", "question": "3?", "answer": "A"}, {"id": "u", "question": " 4? ", "answer": "B"}]
    with (folder / "chemistry/test.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(
        task={"mixture": [{"path": folder / "chemistry"}, {"path": folder / "physics"}, "addition"]},
        evaluation={"prompts": 4},
    )
    trained, evaluated = training_tasks(config), evaluation_tasks(config)
    partial, shared = evaluation_remarks(config.evaluation, evaluated, trained)
    assert partial == (
        "only the first 4 of 5 test questions of chemistry are evaluated (evaluation.prompts; null: all)"
    )
    assert shared.startswith(
        "1 of 4 test questions of chemistry are also trained on, word for word (the first: "
    )
    assert "chemistry/test/t is " in shared
    del evaluated["addition"]
    everything = config_of(evaluation={"prompts": None}).evaluation
    (shared,) = evaluation_remarks(everything, evaluated, trained)
    assert shared.startswith("2 of 5 test questions of chemistry are also trained on")


@each_row(
    "sections, said",
    [
        (
            {"evaluation": {"splits": ["validation"]}, "task": {"path": "chemistry"}},
            "evaluation.splits: task chemistry has no validation",
        ),
        (
            {"evaluation": {"prompts": None}},
            "evaluation.prompts: null means all, but task addition is endless",
        ),
        (
            {"evaluation": {"tasks": ["addition", "addition"]}},
            "evaluation.tasks: two tasks are called addition",
        ),
    ],
)
def test_evaluations_that_cannot_be_run(folder, sections, said):
    if "task" in sections:
        sections = {**sections, "task": {"path": folder / sections["task"]["path"]}}
    with pytest.raises(ConfigError, match=said):
        evaluation_tasks(config_of(**sections))


def test_nothing_to_train_on(folder):
    (folder / "physics/train.jsonl").unlink()
    with pytest.raises(ConfigError, match="task physics has no questions to train on"):
        training_tasks(config_of(task={"path": folder / "physics"}))
