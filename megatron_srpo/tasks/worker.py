"""A verifier process: jobs in on standard input, verdicts out on standard output, one JSON line each. Started
by `pool`.

Model output is data here: verifiers parse it, and an audit hook refuses whatever would evaluate it. No torch
in these processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType

from megatron_srpo.data.records import Verdict

Verifier = Callable[[str, str], Verdict]
NUMERALS = {
    "Integer",
    "Float",
    "Rational",
    "sympy",
    "*",
}  # names in the code by which sympy makes a number of a numeral
PLACE_FOR_OWN_CODE = (
    "megatron_srpo_own_tasks"  # the module name of a user's file, so that its dataclasses can be looked up
)


def load_attribute(reference: str) -> object:
    """`module:name.name` or `path/file.py:name.name`.

    Raises ImportError or AttributeError, or whatever the user's file raises.
    """
    source, _, name = reference.rpartition(":")
    if source.endswith(".py"):
        file = Path(source)
        spec = importlib.util.spec_from_file_location(f"{PLACE_FOR_OWN_CODE}.{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found: object = module
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def judge(verifier: Verifier, answer: str, text: str) -> dict:
    """The verdict as plain data, or {"failed": why}."""
    try:
        verdict = verifier(answer, text)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"the verifier returned {type(verdict).__name__}, not a Verdict")
        return json.loads(
            verdict.model_dump_json()
        )  # which refuses halves of surrogate pairs, as the run's files would
    except MemoryError:
        return {"failed": "memory"}
    except Exception as error:  # a verifier's bug must not end the run, and is counted
        return {"failed": f"error: {type(error).__name__}: {error}"[:500]}


def main() -> None:
    """First line in: {"verifiers": {task: reference}, "memory_bytes", "seconds"}; first line out: {} or
    {"refused": why}.

    Then [task, answer, text] in and a verdict out, in order, until the input ends. A job that takes longer
    than `seconds` ends the process by itself, in case nobody is left to kill it; so does one that ran out of
    memory.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a verifier prints must not stand between the answers
    for number in (signal.SIGINT, signal.SIGUSR1):  # Ctrl-C and Slurm's warning are the run's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    jobs = (json.loads(line) for line in sys.stdin.buffer)
    settings = next(jobs)
    judging = threading.Event()
    sys.addaudithook(partial(_refuse_evaluation, judging))

    def say(row: dict) -> None:
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    try:
        verifiers = {task: load_attribute(reference) for task, reference in settings["verifiers"].items()}
    except Exception as error:
        say({"refused": f"{type(error).__name__}: {error}"})
        return
    _limit_memory(settings["memory_bytes"])
    say({})
    for task, answer, text in jobs:
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        judging.set()
        row = judge(verifiers[task], answer, text)
        judging.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(row)
        if row.get("failed") == "memory":
            return


def _refuse_evaluation(judging: threading.Event, event: str, arguments: tuple) -> None:
    """Audit hook: no verifier, nor a library under it, runs a string as code. What classes, sympy's numbers
    and its arithmetic of monomials are made by may.
    """
    if event != "exec" or not judging.is_set():
        return
    frame = sys._getframe(1)
    caller = frame.f_globals.get("__name__", "")
    if caller in ("collections", "dataclasses", "sympy.polys.monomials"):
        return
    # nothing but numerals, and no code within: a comprehension has names of its own
    is_flat = not any(isinstance(constant, CodeType) for constant in arguments[0].co_consts)
    if caller == "sympy.parsing.sympy_parser" and is_flat and set(arguments[0].co_names) <= NUMERALS:
        return
    while frame and frame.f_code is not judge.__code__:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":  # a module being imported
            return
        frame = frame.f_back
    raise PermissionError(f"{caller} wanted to evaluate a string; model output is data")


def _limit_memory(size: int) -> None:
    import resource

    for limit in (resource.RLIMIT_DATA, resource.RLIMIT_AS):  # some systems keep only one of them
        resource.setrlimit(limit, (size, resource.getrlimit(limit)[1]))


if __name__ == "__main__":
    main()
