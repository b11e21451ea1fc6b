"""Test the verifier pool: no response can hang it, end it or falsify a verdict."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSection
from megatron_srpo.tasks.catalog import verifiers
from megatron_srpo.tasks.pool import Job, Pool

BAD = f"{Path(__file__).parent / 'own_verifiers.py'}:misbehave"


def jobs(*texts):
    return [Job("bad", "right", text) for text in texts]


@pytest.fixture(scope="module")
def pool():
    """Return a pool of two workers with 400 MiB each, and time enough on the busiest machine."""
    pool = Pool({"bad": BAD}, TaskSection(verifier_seconds=60.0, verifier_memory_mib=400))
    yield pool
    pool.close()


def test_verdicts_come_in_order(pool):
    texts = ["right" if number % 3 else f"wrong {number}" for number in range(500)]
    verdicts = pool.verify(jobs(*texts))
    assert [verdict.correct for verdict in verdicts] == [text == "right" for text in texts]
    assert len({verdict.feedback for verdict in verdicts}) == 2  # process ids: both had a share
    assert pool.verify([]) == []


def test_slurms_warning_ends_no_worker(pool):
    before = [worker.process.pid for worker in pool.workers]
    for process in before:
        os.kill(process, signal.SIGUSR1)
    assert [verdict.correct for verdict in pool.verify(jobs("right", "wrong"))] == [True, False]
    assert [worker.process.pid for worker in pool.workers] == before


def check_among_good_ones(pool, kinds):
    """Verify each bad job among good ones: it is marked, and no other job is lost."""
    texts = [text for kind in kinds for text in ("right", kind, "wrong", "right")]
    verdicts = pool.verify(jobs(*texts))
    for text, verdict in zip(texts, verdicts, strict=True):
        assert (verdict.verifier_failed or "").startswith(kinds.get(text, "")) and (
            verdict.verifier_failed is None
        ) == (text not in kinds)
        assert verdict.correct == (text == "right")
        assert verdict.excluded == (text in kinds)
        assert verdict.reward == float(verdict.correct)
    assert [v.correct for v in pool.verify(jobs("right", "wrong"))] == [True, False]  # all replaced


def test_what_fails_is_marked_and_nothing_else_is_lost(pool):
    kinds = {
        "die": "died",
        "crash": "died",
        "eat": "memory",
        "raise": "error: KeyError: 'a bug'",
        "recurse": "error: RecursionError: maximum recursion depth exceeded",
        "nothing": "error: TypeError: the verifier returned NoneType, not a Verdict",
        "nan": "error: ValidationError",
        "contradict": "error: ValidationError: 1 validation error for Verdict\n"
        "  Value error, correct: False, but reward is 0.9",
        "surrogate": "error: PydanticSerializationError",
    }
    check_among_good_ones(pool, kinds)


def test_what_hangs_is_killed():
    # Also a verifier that ignores every signal but SIGKILL.
    pool = Pool({"bad": BAD}, TaskSection(verifier_seconds=2.0))
    check_among_good_ones(pool, {"hang": "timeout", "hang deaf": "timeout"})
    pool.close()


def test_no_verifier_evaluates_a_string(pool):
    # Nor does a library that it uses: sympy's parser would.
    texts = {
        "eval 1": True,
        "eval __import__('os')._exit(0)": True,
        "compile 1": True,
        "sympy sin(1)": True,
        "sympy (1).__class__": True,
        # sympy makes no symbols of attributes, and the names in a comprehension are those of code within the
        # code
        "sympy [(1).__class__.evalf.__globals__['__builtins__']['exit']() for {}[1] in [1]]": True,
        "sympy (lambda: (1).evalf.__globals__)()": True,
        "sympy 1 + 2/3": False,
        "classes": False,
        "right": False,
    }
    verdicts = pool.verify(jobs(*texts))
    refused = [
        verdict.verifier_failed is not None and "tried to evaluate a string" in verdict.verifier_failed
        for verdict in verdicts
    ]
    assert refused == list(texts.values())
    assert verdicts[-1].correct and verdicts[-3].reward == pytest.approx(5 / 3)


def test_what_a_verifier_prints_is_no_verdict(pool):
    assert [v.correct for v in pool.verify(jobs("chatter", "right", "chatter"))] == [False, True, False]


def test_workers_import_no_torch(pool):
    (verdict,) = pool.verify(jobs("modules"))
    modules = set(verdict.feedback.split())
    assert (
        "megatron_srpo.data.records" in modules
        and not {"torch", "transformers", "numpy", "megatron.core"} & modules
    )


SCIENCE = {
    name: verifier.path("paper") for name, verifier in verifiers().items() if verifier.requires is None
}


def test_workers_of_every_builtin_verifier_import_no_torch():
    # Its CUDA wheel maps more memory than the limit allows.
    references = SCIENCE | {"bad": BAD}
    for name, module in (("math", "math_verify"), ("procedural", "reasoning_gym")):
        if importlib.util.find_spec(module) is not None:
            references[name] = {"math": "megatron_srpo.tasks.mathematics:verify"}.get(
                name, "megatron_srpo.tasks.procedural:verify"
            )
    pool = Pool(references, TaskSection(verifier_workers=1))
    (verdict,) = pool.verify(jobs("modules"))
    pool.close()
    assert not {"torch", "transformers", "megatron.core"} & set(verdict.feedback.split())


def test_what_a_library_maps_when_it_is_imported_does_not_count_as_a_jobs_memory(tmp_path):
    # As torch's CUDA wheel does, if the user's own task imports it.
    file = tmp_path / "large.py"
    file.write_text(LARGE)
    settings = TaskSection(verifier_workers=1, verifier_memory_mib=512)
    pool = Pool({"bad": f"{file}:verify"}, settings)
    verdicts = pool.verify(jobs("right" + " " * 4_000_000, "eat", "right"))
    pool.close()
    assert [(verdict.correct, verdict.verifier_failed) for verdict in verdicts] == [
        (True, None),
        (False, "memory"),
        (True, None),
    ]


LARGE = """
import mmap
from megatron_srpo.data.records import Verdict
held = mmap.mmap(-1, 3 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def verify(answer, text):
    if text == "eat":
        eaten = [bytearray(64 << 20) for _ in range(20)]
    correct = f"{text} {text}".split()[0] == answer
    return Verdict(reward=float(correct), correct=correct, format_ok=True)
"""
SLOW = """
import time
from megatron_srpo.data.records import Verdict
library = None


def prepare():
    global library
    time.sleep(3)
    library = "imported"


def verify(answer, text):
    assert library is not None
    return Verdict(reward=1.0, correct=True, format_ok=True)
"""


def test_slow_imports_are_no_timeouts(tmp_path):
    # They are over before the clock of the first job starts.
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    pool = Pool({"bad": f"{file}:verify"}, TaskSection(verifier_workers=2, verifier_seconds=1.0))
    verdicts = pool.verify(jobs("a", "b", "c", "d"))
    pool.close()
    assert all(verdict.correct for verdict in verdicts)


def test_a_library_that_cannot_be_imported_is_reported_at_the_start(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(SLOW.replace("time.sleep(3)", "import nowhere"))
    with pytest.raises(ConfigError, match="a verifier cannot be loaded: ModuleNotFoundError"):
        Pool({"bad": f"{file}:verify"}, TaskSection(verifier_workers=1))


def test_mathematics_is_imported_before_the_first_job():
    pytest.importorskip("math_verify")
    both = {"math": "megatron_srpo.tasks.mathematics:verify", "bad": BAD}
    pool = Pool(both, TaskSection(verifier_workers=1))
    (verdict,) = pool.verify(jobs("modules"))
    pool.close()
    assert "math_verify" in verdict.feedback.split() and "sympy" in verdict.feedback.split()


def test_a_failure_names_file_and_line(pool):
    (verdict,) = pool.verify(jobs("raise"))
    line = Path(BAD.rpartition(":")[0]).read_text().splitlines().index('        raise KeyError("a bug")') + 1
    assert verdict.verifier_failed == f"error: KeyError: 'a bug' ({BAD.rpartition(':')[0]}:{line})"


def test_large_texts_in_both_directions(pool):
    # More than any pipe holds, and every character that JSON must escape.
    big = '\x00\ud800"\\\n🙂' * 150_000
    verdicts = pool.verify([*jobs(*[big] * 6), Job("bad", big, big)])
    assert [v.correct for v in verdicts] == [False] * 6 + [True]


def test_an_interrupted_verification_leaves_no_answers_behind(pool):
    # The next jobs must not get the verdicts of the abandoned ones.

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        pool.verify(jobs(*["hang", "right", "right"] * 10))
    signal.signal(signal.SIGALRM, before)
    verdicts = pool.verify(jobs("wrong", "wrong"))
    assert [(verdict.verifier_failed, verdict.correct) for verdict in verdicts] == [(None, False)] * 2


def test_zero_instead_of_excluded():
    pool = Pool({"bad": BAD}, TaskSection(verifier_failed="zero", verifier_workers=1))
    verdict, other = pool.verify(jobs("raise", "right"))
    assert (
        verdict.verifier_failed.startswith("error: KeyError")
        and not verdict.excluded
        and verdict.reward == 0
        and other.correct
    )
    process = pool.workers[0].process
    process.kill()
    process.wait()
    assert pool.verify(jobs("right"))[0].correct  # it ended while idle: no job has failed
    process = pool.workers[0].process
    del pool
    gc.collect()
    assert process.poll() is not None  # workers end with their pool


@each_row(
    "reference, said",
    [
        ("megatron_srpo.tasks.nowhere:verify", "ModuleNotFoundError"),
        ("megatron_srpo.tasks.addition:judge", "AttributeError"),
        (BAD.replace("own_", "no_"), "FileNotFoundError"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_refused_at_once(reference, said):
    with pytest.raises(ConfigError, match=f"task.verifier: a verifier cannot be loaded: {said}"):
        Pool({"bad": reference}, TaskSection(verifier_workers=1))


def test_an_error_in_the_users_file_is_reported(monkeypatch):
    monkeypatch.setitem(os.environ, "BREAK", "1")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        Pool({"bad": BAD}, TaskSection(verifier_workers=1))


def test_a_worker_left_alone_ends_by_itself():
    # Its input closes when the run has ended, in whatever way.
    pool = Pool({"bad": BAD}, TaskSection(verifier_workers=1))
    process = pool.workers[0].process
    pool.workers[0].connection.close()
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() == 0
