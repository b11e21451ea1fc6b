"""reasoning-gym's procedural tasks by name: `task.name: reasoning_gym/basic_arithmetic` (extra `tasks`)."""

import ast
import json
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSection, TaskSource
from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.tasks.catalog import BuiltinTask
from megatron_srpo.tasks.extract import after_thinking, last_answer_block, verdict_of
from megatron_srpo.tasks.pool import Job, Pool
from megatron_srpo.tasks.procedural_scorers import SCORERS

CHECKED = 20  # entries tried before a run
LUCKY = 2  # a constant may be accepted for so many of them
# Answers without a look at the question; the question itself is tried, too.
CONSTANTS = ("0", "1", "nan", "8*4*1 - 8")
PREFIX = "reasoning_gym/"
SIZE = 1_000  # entries of one dataset, some are created at once; the next thousand comes from another seed
# Raised by scorers for a malformed answer, or one too deep for their parsers.
_WRONG = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
MALFORMED = (*_WRONG, SyntaxError, RecursionError)


class Procedural:
    """Entries by (seed, split, index). The ground truth is JSON: the dataset, its options, and the entry.

    The entry is a Python literal, as JSON keeps neither the tuples nor the integer keys that scorers compare.
    """

    verifier = "megatron_srpo.tasks.procedural:verify"

    def __init__(self, source: TaskSource, seed: int):
        """Raise ConfigError for an unknown dataset, wrong options, or without reasoning-gym."""
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            needed = f"needs reasoning-gym ({error}); pip install 'megatron_srpo[tasks]'"
            raise ConfigError(f"task.name: {source.name} {needed}") from None
        self.name, self.seed, self.options = source.name, seed, source.options
        self.dataset = source.name.removeprefix(PREFIX)
        if self.dataset not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            raise ConfigError(f"task.name: reasoning-gym has no dataset {self.dataset!r}; known: {known}")
        self._create = lru_cache(maxsize=4)(partial(_dataset, self.dataset, self.options, size=SIZE))
        try:
            prompts = [self.prompt("train", index) for index in range(CHECKED)]
        except Exception as error:  # wrong options can raise any error in the library
            problem = f"{self.dataset} cannot be created with {self.options}: {error}"
            raise ConfigError(f"task.options: {problem}") from None
        self._check(prompts)

    def _check(self, prompts: list[Prompt]) -> None:
        """Judge the dataset's own answers and wrong ones as in a run; raise ConfigError for wrong verdicts.

        Some datasets accept anything, or one constant; some would evaluate answers as Python code, which the
        workers refuse.
        """
        right = []
        for prompt in prompts:
            answer = _entry(prompt.answer)["answer"]
            # Some have no answer, and an integral that sympy left unsolved is not one.
            if answer is not None and "Integral(" not in str(answer):
                right.append(Job(self.name, prompt.answer, f"<answer>{answer}</answer>"))
        nonsense = [Job(self.name, prompt.answer, "<answer>[no such answer]</answer>") for prompt in prompts]
        constants, tried = [], []
        for prompt in prompts:
            answer, question = str(_entry(prompt.answer)["answer"]), _entry(prompt.answer)["question"]
            for kind, constant in (*((repr(one), one) for one in CONSTANTS), ("question", question)):
                if not _is_same(constant, answer):
                    constants.append((kind, answer))
                    tried.append(Job(self.name, prompt.answer, f"<answer>{constant}</answer>"))
        pool = Pool({self.name: self.verifier}, TaskSection(verifier_workers=1))
        verdicts = pool.verify([*right, *nonsense, *tried])
        pool.close()
        if not all(verdict.correct for verdict in verdicts[: len(right)]):
            problem = "does not accept its own answers, or would evaluate them as code"
            raise ConfigError(f"task.name: {self.name} cannot be verified: reasoning-gym {problem}")
        judged = verdicts[len(right) : len(right) + len(nonsense)]
        if any(verdict.correct or verdict.verifier_failed for verdict in judged):
            problem = "accepts wrong answers, or cannot judge them"
            raise ConfigError(f"task.name: {self.name} cannot be verified: reasoning-gym {problem}")
        accepted: dict[str, list[str]] = {}
        for (kind, answer), verdict in zip(constants, verdicts[-len(constants) :], strict=True):
            if verdict.correct:
                accepted.setdefault(kind, []).append(answer)
        for kind, answers in accepted.items():
            # A scorer that takes the last number of an answer finds the right one in a constant now and then.
            if len(answers) > LUCKY and len(set(answers)) > 1:
                problem = f"accepts the constant {kind} where the answer is {answers[0][:100]!r}"
                raise ConfigError(f"task.name: {self.name} cannot be verified: reasoning-gym {problem}")

    def size(self, split: str) -> None:
        """Return None: every split is endless."""
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        """Return entry `index` of `split`; splits have their own seeds, but share some of a small dataset."""
        thousand, place = divmod(index, SIZE)
        entry = self._create(seed=zlib.crc32(f"{self.seed}/{split}/{thousand}".encode()))[place]
        text = f"{entry['question']}\n\nPut your final answer between <answer> and </answer>."
        truth = {"dataset": self.dataset, "options": self.options, "entry": repr(_plain(entry))}
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=json.dumps(truth),
        )


def verify(answer: str, text: str) -> Verdict:
    """Accept an answer with the dataset's full score; partial scores and unreadable answers are wrong."""
    given = last_answer_block(after_thinking(text))
    if given is None:
        return verdict_of(False, False, "Your response holds no <answer> block.")
    truth: dict[str, Any] = json.loads(answer)
    score, entry = _scorer(truth["dataset"], json.dumps(truth["options"])), _entry(answer)
    try:
        correct = score(given, entry) == 1.0  # spell_backward's partial scores can add up to more than 1
    except MALFORMED:
        correct = False
    return verdict_of(correct, True, "Your answer is wrong.")


def prepare() -> None:
    """Import the library (a worker calls it before the time of its first job begins)."""
    import reasoning_gym.factory  # noqa: F401


@lru_cache(maxsize=64)
def _scorer(dataset: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """Return our scorer of (answer, entry), or that of the dataset with these options (as JSON)."""
    if dataset == "composite":
        parts = {part["name"]: json.dumps(part["config"]) for part in json.loads(options)["datasets"]}
        return partial(_score_part, parts)
    return SCORERS.get(dataset) or _dataset(dataset, json.loads(options), seed=0).score_answer


def _score_part(parts: dict[str, str], given: str, entry: dict[str, Any]) -> float:
    name = entry["metadata"]["source_dataset"]
    return _scorer(name, parts[name])(given, entry)


def _dataset(name: str, options: dict[str, Any], **more: int) -> Any:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import create_dataset

    if name == "composite" and "datasets" in options:
        options = {**options, "datasets": [DatasetSpec(**part) for part in options["datasets"]]}
    return create_dataset(name, **options, **more)


def _entry(answer: str) -> dict[str, Any]:
    return ast.literal_eval(json.loads(answer)["entry"])


def _is_same(constant: str, answer: str) -> bool:
    """Return True if a constant happens to be the answer, as text or as a number."""
    if constant.strip().casefold() == answer.strip().casefold():
        return True
    try:
        return float(constant) == float(answer)
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    """Convert to Python's own types, whose repr can be read again; other types become text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(_plain(item) for item in value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value if value is None else str(value)


TASK = BuiltinTask(f"{PREFIX}DATASET", Procedural, reads_options=True)
