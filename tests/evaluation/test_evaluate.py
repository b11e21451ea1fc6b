"""Test the eval and compare commands: results, resuming, comparison.

Evaluation during training takes the same path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from samples import sample_rows

from megatron_srpo.__main__ import main
from megatron_srpo.evaluation import answers, run

ROOT = Path(__file__).parents[2]
START = ROOT / "examples/quickstart/start"
SETTINGS = [
    f"hf_path={START}",
    "evaluation.prompts=10",
    "evaluation.samples=4",
    "rollout.max_response_tokens=40",
    "train.seed=3",
]


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function of (name, *arguments) that returns (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["megatron_srpo", *map(str, arguments)])
        status = main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def evaluation(command):
    """Return a function of (folder, *overrides) that runs `eval` on the quick start's start model.

    It returns what `command` returns.
    """
    return lambda folder, *overrides: command(
        "eval", ROOT / "examples/quickstart/config.yaml", *SETTINGS, f"logging.dir={folder}", *overrides
    )


@pytest.fixture
def words(tmp_path):
    """Write a second task: a JSONL file that the model cannot solve."""
    file = tmp_path / "words.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": f"w{n}", "question": f"Word {n}?", "answer": "none"}) + "\n" for n in range(4)
        )
    )
    return f"{{path: {file}, verifier: exact}}"


def test_results_are_those_of_the_samples(evaluation, words, tmp_path):
    # Every number of result.json is recomputed from the samples it kept.
    status, out, _ = evaluation(tmp_path / "run", f"evaluation.tasks=[addition, {words}]")
    assert status == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert list(result["tasks"]) == ["addition", "words"]
    table = (tmp_path / "run/result.md").read_text()
    assert table.strip() in out and "| mean |" in table
    for name, count in (("addition", 10), ("words", 4)):
        task, samples = (
            result["tasks"][name],
            sample_rows(tmp_path / f"run/samples/{name}.jsonl"),
        )
        greedy = [json.loads(line) for line in (tmp_path / f"run/samples/{name}.greedy.jsonl").open()]
        assert (len(samples), len(greedy), task["question_count"]) == (4 * count, count, count)
        right = [
            [sample["verdict"]["correct"] for sample in samples[start : start + 4]]
            for start in range(0, 4 * count, 4)
        ]
        assert task["avg@4"] == pytest.approx(sum(map(sum, right)) / (4 * count))
        assert task["pass@4"] == pytest.approx(sum(map(any, right)) / count)
        pairs = [sum(a or b for i, a in enumerate(row) for b in row[i + 1 :]) / 6 for row in right]
        assert task["pass@2"] == pytest.approx(sum(pairs) / count)
        assert task["greedy"] == sum(sample["verdict"]["correct"] for sample in greedy) / count
        assert task["response_tokens_mean"] == pytest.approx(
            sum(len(sample["response_ids"]) for sample in samples) / len(samples)
        )
        low, high = task["avg@4/interval"]
        assert low <= task["avg@4"] <= high
    assert result["tasks"]["words"]["avg@4"] == 0 < result["tasks"]["addition"]["avg@4"]
    assert result["overall"]["avg@4"] == pytest.approx(result["tasks"]["addition"]["avg@4"] / 2)
    assert result["overall"]["tokens_per_second"] > 0


def test_an_interrupted_command_resumes(evaluation, tmp_path, monkeypatch):
    # Chunks of two questions; the second is cut in the middle of a line. The same command then gives the
    # result of an uninterrupted one.
    monkeypatch.setattr(run, "CHUNK_SEQUENCES", 8)
    small = ["evaluation.greedy=false", "evaluation.prompts=6"]
    assert evaluation(tmp_path / "uninterrupted", *small)[0] == 0
    append, appended = answers.Answers.append, []

    def cut(answers, groups):
        append(answers, groups)
        appended.append(len(groups))
        if len(appended) == 2:
            content = answers.path.read_bytes()
            answers.path.write_bytes(content[: len(content) - 700])
            raise KeyboardInterrupt

    monkeypatch.setattr(answers.Answers, "append", cut)
    assert evaluation(tmp_path / "cut", *small)[0] == 130
    assert not (tmp_path / "cut/result.json").exists()
    assert evaluation(tmp_path / "cut", *small, "rollout.batch_size=5")[0] == 0
    assert (
        sum(appended[2:]) == 3
    )  # three of six were answered, the fourth's last line was cut: answered questions are not sampled again
    texts = [sample_rows(tmp_path / name / "samples/addition.jsonl") for name in ("uninterrupted", "cut")]
    assert [(row["prompt"]["id"], row["index"], row["response_ids"]) for row in texts[0]] == [
        (row["prompt"]["id"], row["index"], row["response_ids"]) for row in texts[1]
    ]
    results = [
        json.loads((tmp_path / name / "result.json").read_text())["tasks"]["addition"]
        for name in ("uninterrupted", "cut")
    ]
    assert results[0]["questions"] == results[1]["questions"]


def test_answers_are_kept_as_they_arrive_and_progress_is_shown(evaluation, tmp_path, monkeypatch):
    # Row: eval prints nothing until it ends and saves nothing until a batch of 256 is done. Killed in the
    # middle of the only chunk, after two of the engine's three waves: the rest alone is sampled later.
    monkeypatch.setattr(run, "PROGRESS_SECONDS", 0.0)
    small = ["evaluation.greedy=false", "evaluation.prompts=6", "rollout.batch_size=4"]
    status, _, error = evaluation(tmp_path / "uninterrupted", *small)
    assert status == 0
    assert [line for line in error.splitlines() if "of 24" in line] == [
        f"addition: {count} of 24 answers" for count in (0, 8, 16, 24, 24)
    ]
    keep, kept = answers.Answers.keep, []

    def cut(self, samples):
        keep(self, samples)
        kept.append(len(samples))
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers.Answers, "keep", cut)
    assert evaluation(tmp_path / "cut", *small)[0] == 130
    assert not (tmp_path / "cut/samples/addition.jsonl").exists()
    status, _, error = evaluation(tmp_path / "cut", *small)
    assert status == 0 and kept == [8, 8, 8] and "addition: 16 of 24 answers" in error
    texts = [sample_rows(tmp_path / name / "samples/addition.jsonl") for name in ("uninterrupted", "cut")]
    assert texts[0] == texts[1]
    assert not (tmp_path / "cut/samples/unfinished").exists()


def test_results_belong_to_the_checksum_of_the_weights(evaluation, tmp_path):
    # Row: eval shows old results for new weights. The weights, or the chat template, are overwritten.
    model, short = tmp_path / "model", ["evaluation.greedy=false", "evaluation.prompts=2"]
    shutil.copytree(START, model)
    arguments = [tmp_path / "run", *short, f"hf_path={model}"]
    status, out, _ = evaluation(*arguments)
    weights = (model / "model.safetensors").read_bytes()
    expected = f"model.safetensors {hashlib.sha256(weights).hexdigest()}\n"
    found = json.loads((tmp_path / "run/result.json").read_text())["weights"]
    assert status == 0 and found == hashlib.sha256(expected.encode()).hexdigest() and found[:12] in out
    assert evaluation(*arguments)[0] == 0
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    status, out, error = evaluation(*arguments)
    assert status == 2 and "holds answers of another model (weights changed since)" in error and not out
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    status, _, error = evaluation(*arguments)
    assert status == 2 and "another model (tokenizer_config.json changed since)" in error
    (tmp_path / "run/model.json").unlink()
    status, _, error = evaluation(*arguments)
    assert status == 2 and "an evaluation of an older version" in error


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("samples/addition.jsonl", '"index":0', '"index":"a"', "addition.jsonl:1: index: Input should be"),
        ("samples/addition.jsonl", '"verdict":{', '"verdict":null,"route":{', "addition.jsonl:1: "),
        ("samples/addition.seconds", ".", "x", "addition.seconds: is damaged"),
        ("model.json", "{", "[{", "model.json: cannot be read"),
    ],
)
def test_wrong_types_in_an_evaluations_files_are_one_sentence(evaluation, tmp_path, file, old, new, said):
    # Row: wrong types in a run's files: tracebacks.
    arguments = [tmp_path / "run", "evaluation.greedy=false", "evaluation.prompts=1"]
    assert evaluation(*arguments)[0] == 0
    text = (tmp_path / "run" / file).read_text()
    assert old in text
    (tmp_path / "run" / file).write_text(text.replace(old, new, 1))
    status, _, error = evaluation(*arguments)
    assert status == 2 and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    "change",
    [{"tasks": []}, {"tasks": {}}, {"tasks": {"t": 1}}, {"model": 3}]
    + [{"tasks": {"t": {"questions": {"avg@2": value}}}} for value in ([], {"q": "a"}, {"q": None})],
)
def test_wrong_types_in_a_result_are_one_sentence(command, tmp_path, change):
    result = {"model": "m", "tasks": {"t": {"questions": {"avg@2": {"q": 0.5}}}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert command("compare", tmp_path, tmp_path)[0] == 0
    (tmp_path / "result.json").write_text(json.dumps(result | change))
    status, _, error = command("compare", tmp_path, tmp_path)
    assert status == 2 and "result.json: is not a result of the eval command: " in error


def test_another_evaluation_in_the_same_folder_is_refused(evaluation, command, tmp_path):
    folder = tmp_path / "run"
    assert evaluation(folder, "evaluation.greedy=false", "evaluation.prompts=2")[0] == 0
    before = (folder / "result.json").read_text()
    status, _, error = evaluation(
        folder, "evaluation.greedy=false", "evaluation.prompts=2", "evaluation.top_p=0.5"
    )
    assert status == 2 and "holds an evaluation with different settings (evaluation)" in error
    for name in ("train", "sample"):
        status, _, error = command(
            name, ROOT / "examples/quickstart/config.yaml", f"hf_path={START}", f"logging.dir={folder}"
        )
        assert status == 2 and "holds an evaluation; name another folder" in error
    assert (folder / "result.json").read_text() == before
    (tmp_path / "metrics.jsonl").write_text("")
    status, _, error = evaluation(tmp_path)
    assert status == 2 and "holds a training run" in error


def test_answers_of_two_checkpoints_are_not_mixed(command, evaluation, tmp_path):
    # The run continued between two calls of the same command: the newest checkpoint is another.
    run, short = (
        tmp_path / "run",
        ["evaluation.greedy=false", "evaluation.prompts=2", f"checkpoint={tmp_path / 'run'}"],
    )
    config = ROOT / "examples/quickstart/config.yaml"
    sizes = [
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "evaluation.every=0",
        f"logging.dir={run}",
    ]
    assert (
        command(
            "train",
            config,
            *SETTINGS,
            *sizes,
            "train.steps=1",
            "checkpoint.save_interval=1",
            "checkpoint.keep_last=9",
        )[0]
        == 0
    )
    assert evaluation(tmp_path / "a", *short)[0] == 0
    assert json.loads((tmp_path / "a/result.json").read_text())["model"].endswith("checkpoints/step_000001")
    assert evaluation(tmp_path / "a", *short)[0] == 0
    shutil.copytree(run / "checkpoints/step_000001", run / "checkpoints/step_000002")
    status, _, error = evaluation(tmp_path / "a", *short)
    assert (
        status == 2
        and "holds an evaluation with different settings (evaluation)" in error
        and "step_000001" in error
    )
    assert evaluation(tmp_path / "a", *short, f"checkpoint={run / 'checkpoints/step_000001'}")[0] == 0


def test_answers_to_other_questions_are_not_reused(evaluation, words, tmp_path):
    # The file of questions changed between two calls of the same command.
    arguments = [
        tmp_path / "run",
        f"evaluation.tasks=[{words}]",
        "evaluation.prompts=3",
        "evaluation.samples=1",
        "evaluation.greedy=false",
    ]
    assert evaluation(*arguments)[0] == 0
    assert evaluation(*arguments)[0] == 0
    file = tmp_path / "words.jsonl"
    file.write_text(file.read_text().replace('"none"', '"some"'))
    status, _, error = evaluation(*arguments)
    assert status == 2 and "holds answers to different questions (first: words/test/w0)" in error


def test_a_run_may_resume_with_another_evaluation(command, tmp_path):
    # resume.override permits it by default: the last scores have other names than the first.
    sizes = [
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "evaluation.every=1",
        "evaluation.prompts=2",
    ]
    start = [
        "train",
        ROOT / "examples/quickstart/config.yaml",
        *SETTINGS,
        *sizes,
        f"logging.dir={tmp_path / 'run'}",
    ]
    assert command(*start, "train.steps=1", "checkpoint.save_interval=1", "evaluation.samples=2")[0] == 0
    status, out, error = command(
        *start, "train.steps=2", "checkpoint.save_interval=1", "evaluation.samples=3"
    )
    assert status == 0, error
    assert "addition/avg@3: " in out and (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("name, split", [("own.validation", "[test, validation]"), ("own.greedy", "[test]")])
def test_tasks_do_not_share_a_file_of_answers(evaluation, tmp_path, name, split):
    # The second task would find its questions answered by the first's answers.
    own = ROOT / "examples/own_task/backwards.py"
    tasks = f"evaluation.tasks=[{{path: {own}, name: own}}, {{path: {own}, name: {name}}}]"
    status, _, error = evaluation(
        tmp_path / "run", tasks, f"evaluation.splits={split}", "evaluation.prompts=1"
    )
    assert status == 2 and "would both write their answers to" in error and name in error
    assert not (tmp_path / "run").exists()


def test_servers_that_are_not_there_are_reported_in_a_line(evaluation, tmp_path):
    # Nothing is sampled; once the servers run, the same command continues in the same folder.
    status, _, error = evaluation(
        tmp_path / "run", "rollout.engine=sglang", "rollout.urls=[http://127.0.0.1:9]"
    )
    assert status == 2 and error.startswith(
        "configuration error: rollout.engine: http://127.0.0.1:9/server_info: ConnectError"
    )
    assert not (tmp_path / "run/samples").exists()
    assert evaluation(tmp_path / "run", "evaluation.greedy=true", "evaluation.prompts=10")[0] == 0


def test_comparison(command, evaluation, tmp_path):
    # A model against itself, and against one whose answers were all made wrong by hand.
    assert evaluation(tmp_path / "a", "evaluation.greedy=false")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    result = json.loads((tmp_path / "b/result.json").read_text())
    questions = result["tasks"]["addition"]["questions"]
    result["tasks"]["addition"]["questions"] = {
        key: dict.fromkeys(values, 0.0) for key, values in questions.items()
    }
    (tmp_path / "b/result.json").write_text(json.dumps(result))
    status, out, _ = command("compare", tmp_path / "a", tmp_path / "a", tmp_path / "b")
    assert status == 0
    same, worse = [line.split(" | ") for line in out.splitlines() if line.startswith("| addition | avg@4")]
    assert same[4:] == ["+0.0", "[+0.0, +0.0]", "1.000 |"]
    base = 100 * sum(questions["avg@4"].values()) / 10
    assert (worse[2], worse[3], worse[4]) == (f"{base:.1f}", "0.0", f"{-base:+.1f}") and worse[
        6
    ] == "< 0.001 |"
    del result["tasks"]["addition"]["questions"]["avg@4"]["addition/test/3"]
    (tmp_path / "b/result.json").write_text(json.dumps(result))
    status, _, error = command("compare", tmp_path / "a", tmp_path / "b")
    assert status == 2 and "has different questions (1 differ, first addition/test/3)" in error
    status, _, error = command("compare", tmp_path / "a", tmp_path / "nowhere")
    assert status == 2 and "the folder of a finished evaluation?" in error


def test_training_evaluates_what_the_command_evaluates(command, evaluation, tmp_path):
    # metrics.jsonl before the first step equals the command's result on the same weights: same questions,
    # same random numbers. Test and validation, a mixture of two tasks; best and mean of the last; per-task
    # metrics of the rollouts.
    own = ROOT / "examples/own_task/backwards.py"
    shared = [
        f"task={{mixture: [addition, {{path: {own}, weight: 3}}]}}",
        "evaluation.splits=[test, validation]",
        "evaluation.prompts=4",
    ]
    sizes = ["train.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2"]
    run = tmp_path / "run"
    status, _, error = command(
        "train",
        ROOT / "examples/quickstart/config.yaml",
        *SETTINGS,
        *shared,
        *sizes,
        "evaluation.every=1",
        f"logging.dir={run}",
        "teacher.feedback=always",
    )
    assert status == 0, error
    assert evaluation(tmp_path / "eval", *shared, "evaluation.greedy=false")[0] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    evaluations, steps = [row for row in rows if "loss" not in row], [row for row in rows if "loss" in row]
    result = json.loads((tmp_path / "eval/result.json").read_text())
    assert set(result["tasks"]) == {"addition", "addition/validation", "backwards", "backwards/validation"}
    for label, task in result["tasks"].items():
        for key in ("avg@4", "pass@4"):
            assert evaluations[0][f"eval/{label}/{key}"] == pytest.approx(task[key])
    status, _, error = evaluation(
        tmp_path / "trained", *shared, "evaluation.greedy=false", f"checkpoint={run}"
    )
    assert status == 0, error
    for label, task in json.loads((tmp_path / "trained/result.json").read_text())[
        "tasks"
    ].items():  # the run's last weights
        assert evaluations[-1][f"eval/{label}/avg@4"] == pytest.approx(task["avg@4"])
    scores = [row["eval/addition/avg@4"] for row in evaluations]
    assert evaluations[-1]["eval/addition/avg_best"] == max(scores)
    assert evaluations[-1]["eval/addition/avg_last_5"] == pytest.approx(sum(scores) / len(scores))
    means = [evaluations[0][f"eval/{name}/avg@4"] for name in ("addition", "backwards")]
    assert evaluations[0]["eval/mean/avg@4"] == pytest.approx(sum(means) / 2)
    assert steps[0]["prompt_share/backwards"] == 0.75 and steps[0]["prompt_share/addition"] == 0.25
    assert steps[0]["pass_rate"] == pytest.approx(
        0.75 * steps[0]["pass_rate/backwards"] + 0.25 * steps[0]["pass_rate/addition"]
    )
    assert steps[0]["verifier_failed_share"] == 0
    samples = [json.loads(line) for line in (run / "rollouts/step_000001.jsonl").open()]
    taught = [
        sample
        for sample in samples
        if sample["prompt"]["task"] == "backwards" and not sample["verdict"]["correct"]
    ]
    assert taught and all(sample["verdict"]["feedback"].startswith("A word of ") for sample in taught)
    assert all(sample["route"]["branch"] == "sdpo" for sample in taught)  # feedback alone makes a teacher
