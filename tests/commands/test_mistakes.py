"""Mistakes of users, in the command line, the configuration and files: each is answered by one sentence."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys

import pytest
from small_run import QUICKSTART
from tables import each_row

from megatron_srpo.__main__ import main

GOOD = f"""\
model: {{hf_path: {QUICKSTART / "start"}, dtype: float32}}
task: {{name: addition}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 4, max_prompt_tokens: 256, max_response_tokens: 64}}
train: {{steps: 3}}
evaluation: {{prompts: 2, samples: 2}}
logging: {{dir: run}}
"""
QUESTION = '{"question": "1 + 1?", "answer": "2"}\n'
FILES = {
    "good.yaml": GOOD,
    "no_model.yaml": GOOD.partition("\n")[2],
    "twice.yaml": GOOD + "train: {steps: 4}\n",
    "tab.yaml": "train:\n\tsteps: 3\n",
    "list.yaml": "- model\n- train\n",
    "empty.yaml": "",
    "no_steps.yaml": GOOD.replace("{steps: 3}", "{seed: 3}"),
    "json.yaml": '{"model": {"hf_path": "x"',
    "latin.yaml": "logging: {dir: läufe}\n".encode("latin-1"),
    "self.yaml": GOOD + "megatron: &m {x: *m}\n",
    "bomb.yaml": GOOD
    + "megatron: {a: &a [1,1,1,1], "
    + ", ".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "}\n",
    "good.jsonl": "".join(QUESTION.replace("{", f'{{"id": {n}, ', 1) for n in range(20)),
    "two.jsonl": QUESTION * 2,
    "empty.jsonl": "",
    "broken.jsonl": QUESTION + '{"question": "2 + 2?", "answer": \n',
    "array.jsonl": json.dumps([{"question": "q", "answer": "a"}]) + "\n",
    "no_answer.jsonl": QUESTION + '{"question": "2 + 2?"}\n',
    "no_question.jsonl": QUESTION + '{"text": "2 + 2?", "answer": "4"}\n',
    "key_twice.jsonl": QUESTION + '{"question": "q", "answer": "1", "answer": "2"}\n',
    "same_id.jsonl": '{"id": 7, "question": "q", "answer": "1"}\n' * 2,
    "latin.jsonl": QUESTION.encode() + '{"question": "größer?", "answer": "1"}\n'.encode("latin-1"),
    "roles.jsonl": '{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}\n',
    "questions.csv": "question,answer\n1 + 1?,2\n",
    "empty_folder/readme.txt": "nothing",
    "syntax.py": "class Mine:\n    def prompt(self\n",
    "no_class.py": "x = 1\n",
    "not_static.py": "class Mine:\n    def size(self, split): ...\n    def prompt(self, split, index): ...\n"
    "    def verify(self, answer, text): ...\n",
    "old_run/metrics.jsonl": "",
}
# model folder → (file to change, its new content; None: removed)
MODELS = {
    "no_config": ("config.json", None),
    "no_weights": ("model.safetensors", None),
    "no_tokenizer": ("tokenizer.json", None),
    "broken_config": ("config.json", "{"),
    "other_type": ("config.json", '{"model_type": "mamba"}'),
    "list_config": ("config.json", "[]"),
    "pointer": ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
    "incomplete": ("config.json", '{"model_type": "qwen3", "hidden_size": 64}'),
}
# What was expected, or what to do; a file that is missing or damaged says it by that.
WORDS = "expected,did you mean,known,set,needs,must,raise,only,remove,is required,write out,missing,supported"
ADVICE = re.compile(rf"\b({WORDS.replace(',', '|')}|damaged|expecting|greedy)\b", re.IGNORECASE)
FOREIGN = (
    "Traceback",
    "Input should",
    "instance of",
    "valid dictionary",
    "pydantic",
    "Errno",
    "object at 0x",
    "s3cr",  # passwords in URLs
)


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command line among FILES and MODELS, and returns (status, errors)."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, (file, content) in MODELS.items():
        shutil.copytree(QUICKSTART / "start", tmp_path / name)
        (tmp_path / name / file).unlink()
        if content is not None:
            (tmp_path / name / file).write_text(content)
    (tmp_path / "pipe.yaml").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe.yaml")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "1")  # the check changes it
            patch.setattr(sys, "argv", ["srpo", *shlex.split(line.replace("check", "config --check", 1))])
            try:
                status = main()
            except SystemExit as error:
                status = int(error.code or 0)
        return status, capsys.readouterr().err

    return run


COMMAND_LINES = [
    ("trian good.yaml", "unknown command 'trian'; did you mean train?"),
    ("learn good.yaml", "unknown command 'learn'; known: train"),
    ("", "expected command, which is missing"),
    ("train", "expected config, which is missing; see srpo train --help"),
    (
        "train good.yaml --lr=1e-4",
        "unknown argument '--lr=1e-4'; expected a key of the configuration as algorithm.lr",
    ),
    ("train good.yaml --train.steps 5", "expected a key of the configuration as train.steps=…"),
    ("train good.yaml --machine h100", "unknown argument '--machine'"),
    ("train good.yaml --url=http://me:s3cret@host", "unknown argument '--url=http://…@host'"),
    (
        "report http://me:s3cret@host/run",
        "http:/…@host/run: is not a run folder: it has no metrics.jsonl; expected",
    ),
    ("plan good.yaml --gpu-memmory 3", "unknown argument '--gpu-memmory'; did you mean --gpu-memory?"),
    ("plan good.yaml --gpus eight", "--gpus: expected an integer, not 'eight'"),
    ("plan good.yaml --gpus 0", "--gpus: 0; expected 1 or more"),
    (
        "plan good.yaml --gpus 6 parallel.tensor_model_parallel_size=4",
        "4 does not divide the 6 processes (--gpus)",
    ),
    ("plan good.yaml --machine b300", "--machine: 'b300'; expected one of h100"),
    ("plan good.yaml --mfu 40", "--mfu: 40; expected a share"),
    ("plan good.yaml --distilled-share 25", "expected --distilled-share from 0 to 1"),
    ("plan good.yaml --gpu-memory -80", "--gpu-memory: -80; expected more than 0"),
    (
        "plan Qwen/Qwen3-9B",
        "Qwen/Qwen3-9B does not exist; expected a YAML file, a model's folder, or one of Qwen/Qwen3-0.6B",
    ),
    ("plan empty_folder", "empty_folder/config.json is missing"),
    ("report", "expected RUN, which is missing"),
    ("report empty_folder", "empty_folder: is not a run folder: it has no metrics.jsonl; expected"),
    ("inspect old_run", "expected --step, which is missing"),
    ("inspect old_run --step one", "--step: expected an integer, not 'one'"),
    ("inspect empty_folder --step 1", "empty_folder: is not a run folder"),
    ("compare old_run", "compare: expected two folders or more"),
    ("config train.steps=3", "config: 'train.steps=3' needs --check FILE"),
    ("check good.yaml --processes 0", "--processes: 0; expected 1 or more"),
    ("check good.yaml --processes 3 parallel.tensor_model_parallel_size=2", "the 3 processes (--processes)"),
    ("check good.yaml lr 1e-4", "override 'lr': expected section.key=value, such as"),
    ("check good.yaml train.steps", "override 'train.steps': expected section.key=value"),
    ("check good.yaml =4", "override '=4': expected section.key=value"),
    ("check good.yaml train.steps:4", "override 'train.steps:4': expected section.key=value"),
]
OVERRIDES = [
    ("lr=1e-4", "lr: unknown key; did you mean algorithm.lr or optimizer.lr?"),
    ("steps=5", "steps: unknown key; did you mean train.steps?"),
    ("train.lr=1e-4", "train.lr: unknown key; did you mean algorithm.lr or optimizer.lr?"),
    ("optimiser.lr=1e-4", "optimiser: unknown key; did you mean optimizer?"),
    ("rollout.temprature=1", "rollout.temprature: unknown key; did you mean temperature?"),
    ("algorithm=grpo", "algorithm: expected a section of keys (set algorithm.name=grpo), not 'grpo'"),
    ("algorithm.name=gpro", "algorithm.name: unknown algorithm 'gpro'; did you mean grpo?"),
    ("algorithm.name=ppo", "algorithm.name: unknown algorithm 'ppo'; known: "),
    (
        "algorithm.mix_lambda=0.5",
        "algorithm.mix_lambda: unknown key; only algorithm.name: advantage_mix has it",
    ),
    ("train=5", "train: expected a section of keys (set train.steps=5), not 5"),
    ("model=start", "model: expected a section of keys (set model.hf_path=start), not 'start'"),
    ("train.steps.more=4", "steps is not a section; expected section.key=value"),
    ("train.steps=many", "train.steps: expected an integer, not 'many'"),
    ("train.steps=1.5", "train.steps: expected an integer, not 1.5"),
    ("train.steps=0", "train.steps: expected more than 0, not 0"),
    ("train.steps=true", "train.steps: expected a number, not True"),
    ("algorithm.entropy_beta=true", "algorithm.entropy_beta: expected a number, not True"),
    ("rollout.logprob_gap_stop=no", "rollout.logprob_gap_stop: expected a number, not False"),
    ("train.steps=", "train.steps: expected an integer, not None"),
    ("train.steps=[1", "the value is not YAML"),
    ("train.seed=-1", "train.seed: expected 0 or more, not -1"),
    ("optimizer.lr=fast", "optimizer.lr: expected a number, not 'fast'"),
    ("optimizer.lr=.nan", "optimizer.lr: expected a finite number, not nan"),
    ("optimizer.adam_beta2=1", "optimizer.adam_beta2: expected less than 1.0, not 1"),
    ("rollout.top_p=1.5", "rollout.top_p: expected at most 1.0, not 1.5"),
    ("model.dtype=fp16", "model.dtype: expected auto, float32 or bfloat16"),
    (
        "model.dtype=bf16",
        "model.dtype: expected auto, float32 or bfloat16 (did you mean bfloat16?), not 'bf16'",
    ),
    (
        "teacher.kind=emma",
        "teacher.kind: expected ema, frozen, live or trust_region (did you mean ema?), not 'emma'",
    ),
    ("parallel.sequence_parallel=maybe", "parallel.sequence_parallel: expected true or false, not 'maybe'"),
    ("parallel.sequence_parallel=true", "sequence_parallel: true needs tensor_model_parallel_size > 1"),
    ("rollout.engine=vllm", "rollout.engine: expected"),
    ("rollout.engine=sglang", "rollout.engine: sglang needs either urls"),
    ("rollout.servers=2", "rollout.servers: needs rollout.engine: sglang, not transformers"),
    ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt: srpo compares the samples of a group"),
    ("evaluation.splits=[train]", "evaluation.splits.0: expected test or validation, not 'train'"),
    ("evaluation.splits=test", "evaluation.splits: expected a list, [one, two], not 'test'"),
    ("evaluation.temperature=0", "evaluation.temperature: 0 is greedy"),
    ("resume=always", "resume.mode: expected auto or never, not 'always'"),
    ("resume.override=[train.step]", "resume.override: 'train.step' is not a key"),
    ("logging.stop_on=[colapse]", "logging.stop_on.0: expected collapse, dead_groups"),
    ("logging.profile_steps=[3]", "logging.profile_steps.1: is required"),
    ("megatron.num_layer=3", "megatron.num_layer"),
    ("rollout.base_url=http://me:s3cret@host/v1", "=http://…@host/v1': rollout.base_url: unknown key"),
    ("rollout.urls=[http://me:s3cret@host]", "rollout.urls: needs rollout.engine"),
    ("train.steps=http://me:s3cr/et@host", "train.steps: expected an integer, not 'http://…@host'"),
    (
        "megatron={proxy: [http://s3cret@host]}",
        "megatron.proxy: expected a URL without user and password, which config.yaml would keep",
    ),
    ("parallel.tensor_model_parallel_size=3", "3 does not divide the model's"),
    ("parallel.expert_model_parallel_size=2", "parallel.expert_model_parallel_size"),
    ("rollout.replay=nowhere", "rollout.replay: "),
    ("rollout.max_prompt_tokens=3", "raise it"),
]
CONFIG_FILES = [
    ("nowhere.yaml", "nowhere.yaml: cannot be read: No such file or directory; expected a YAML file"),
    ("empty_folder", "empty_folder: cannot be read: is a folder; expected a YAML file"),
    ("pipe.yaml", "pipe.yaml: cannot be read: is not a regular file; expected a YAML file"),
    ("no_model.yaml", "no_model.yaml: model: is required; set model.hf_path"),
    ("no_steps.yaml", "no_steps.yaml:4: train.steps: is required: training steps"),
    ("twice.yaml", "twice.yaml:7: train: given twice, first at twice.yaml:4; remove one"),
    ("tab.yaml", "tab.yaml:2: is not valid YAML: while scanning"),
    ("json.yaml", "json.yaml:1: is not valid YAML"),
    ("latin.yaml", "latin.yaml:1: is not valid YAML: not UTF-8"),
    ("list.yaml", "list.yaml: expected sections (model:, train:, …) at the top level"),
    ("empty.yaml", "empty.yaml: expected sections"),
    ("self.yaml", "self.yaml: is nested without end"),
    ("bomb.yaml", "bomb.yaml: holds "),
    ("good.jsonl", "good.jsonl:2: is not valid YAML"),
]
QUESTION_FILES = [
    (
        "good.jsonl task.verifier=math evaluation.splits=[validation]",
        "task good has no validation questions; expected",
    ),
    ("/nope/here.jsonl", "task.path: /nope/here.jsonl does not exist; expected a folder with train.jsonl"),
    ("nowhere.py", "nowhere.py does not exist"),
    (
        "two.jsonl task.verifier=math",
        "task two has no test questions: task.test_share: 0.1 of the 2 questions in two.jsonl rounds to 0",
    ),
    ("good.jsonl", "task.verifier: none for 'good' in good.jsonl. Set task.verifier ("),
    ("good.jsonl task.verifier=maths", "task.verifier: unknown verifier 'maths'; known: "),
    (
        "good.jsonl task.verifier=math task.test_share=0",
        "task good has no test questions: task.test_share: 0 of the 20",
    ),
    ("good.jsonl task.verifier=math task.test_share=1", "task good has no questions to train on"),
    ("good.jsonl task.verifier=math task.test_share=20", "task.test_share: expected at most 1.0, not 20"),
    ("good.jsonl task.verifier=math task.rule=lax", "task.rule: expected paper or strict, not 'lax'"),
    ("good.jsonl task.verifier=math task.options={x: 1}", "task.options: task good does not read it"),
    ("empty.jsonl task.verifier=math", "empty.jsonl: is empty; expected one question a line"),
    ("broken.jsonl task.verifier=math", "broken.jsonl:2: is not JSON"),
    ("array.jsonl task.verifier=math", "array.jsonl:1: is a JSON list; expected an object"),
    ("no_answer.jsonl task.verifier=math", "no_answer.jsonl:2: answer: is missing"),
    ("no_question.jsonl task.verifier=math", "no_question.jsonl:2: question: is missing or empty"),
    (
        "key_twice.jsonl task.verifier=math",
        "key_twice.jsonl:2: is not JSON ('answer' is given twice); expected",
    ),
    ("same_id.jsonl task.verifier=math", "same_id.jsonl:2: id: '7' is also in line 1"),
    ("latin.jsonl task.verifier=math", "latin.jsonl:2: byte 17 is not UTF-8"),
    ("roles.jsonl task.verifier=math", "roles.jsonl:1: messages: expected system messages"),
    ("questions.csv task.verifier=math", "questions.csv is neither a folder nor a .jsonl file"),
    ("empty_folder task.verifier=math", "empty_folder has neither train.jsonl nor test.jsonl"),
    ("syntax.py", "syntax.py:2: cannot be run: SyntaxError"),
    ("no_class.py", "no_class.py: expected one class with size, prompt and verify, found 0"),
    ("not_static.py", "Mine.verify must be a @staticmethod"),
]
OTHER_TASKS = [
    ("task.name=additon", "task.name: unknown task 'additon'; known: addition"),
    ("task.name=chemistry", "task.path: chemistry needs its questions: a folder with train.jsonl"),
    ("task.verifier=math", "task.verifier: task addition does not read it; is task.path missing?"),
    ("task.weight=2", "task.weight: is a task's share of task.mixture"),
    ("'task.mixture=[addition, addition]' task.name=null", "task.mixture: two tasks are called addition"),
    ("'evaluation.tasks=[5]'", "evaluation.tasks.0: expected a task's name, or a mapping"),
]
MODEL_FOLDERS = [
    (
        "Qwen/Qwen3-8B",
        "is not a folder; expected a Hugging Face model folder; to get a model of the Hub: hf download",
    ),
    ("nowhere", "nowhere is not a folder; expected a Hugging Face model folder"),
    ("good.yaml", "good.yaml is not a folder"),
    ("no_config", "no_config/config.json is missing; is this a Hugging Face model folder?"),
    ("no_weights", "no_weights/model.safetensors is missing"),
    ("no_tokenizer", "no_tokenizer: tokenizer.json is missing"),
    ("broken_config", "broken_config/config.json"),
    ("list_config", "list_config/config.json"),
    ("other_type", "other_type/config.json: "),
    ("incomplete", "incomplete/config.json: missing "),
    ("pointer", "pointer/model.safetensors"),
]
MISTAKES = [
    *COMMAND_LINES,
    *((f"check good.yaml {shlex.quote(text)}", said) for text, said in OVERRIDES),
    *((f"check {name}", said) for name, said in CONFIG_FILES),
    *(
        (f"check good.yaml task.path={text}".replace("{x: 1}", "'{x: 1}'"), said)
        for text, said in QUESTION_FILES
    ),
    *((f"check good.yaml {text}", said) for text, said in OTHER_TASKS),
    *((f"check good.yaml hf_path={text}", said) for text, said in MODEL_FOLDERS),
]


def test_there_are_many_different_mistakes():
    assert len({line for line, _ in MISTAKES}) == len(MISTAKES) >= 80


@each_row("line, said", MISTAKES)
def test_each_mistake_is_answered_by_one_sentence(answer, line, said):
    status, errors = answer(line)
    assert status == 2 and said in errors, errors
    (sentence,) = errors.splitlines()
    assert re.match(r"(configuration error|error|srpo[ a-z]*: error): ", sentence), sentence
    assert ADVICE.search(sentence) and len(sentence) < 600, sentence
    assert not any(part in sentence for part in FOREIGN), sentence
