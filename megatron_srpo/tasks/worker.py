"""A verifier process of the `pool`: it receives JSON messages with jobs, and sends one verdict per job.

Model output is data: verifiers parse it, and an audit hook refuses to evaluate it. Workers import no torch.
"""

import importlib
import importlib.util
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import Any

from megatron_srpo.data.records import Verdict

Verify = Callable[[str, str], Verdict]
NUMERALS = {"Integer", "Float", "Rational", "sympy", "*"}  # names by which sympy creates a number
OWN_MODULE = "megatron_srpo_own_tasks"  # of a user's file, so that its dataclasses can be looked up


def load_attribute(reference: str) -> Any:
    """Import `module:name.name` or `path/file.py:name.name`; raise what importing it raises."""
    source, _, name = reference.rpartition(":")
    if source.endswith(".py"):
        file = Path(source)
        spec = importlib.util.spec_from_file_location(f"{OWN_MODULE}.{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    return attrgetter(name)(module) if name else module


def judge(verifier: Verify, answer: str, text: str) -> dict[str, Any]:
    """Return the verdict as plain data, or {"failed": why}."""
    try:
        verdict = verifier(answer, text)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"the verifier returned {type(verdict).__name__}, not a Verdict")
        return json.loads(verdict.model_dump_json())  # refuses half surrogate pairs, as the run's files do
    except MemoryError:
        return {"failed": "memory"}
    except Exception as error:  # a verifier's bug must not end the run, and is counted
        return {"failed": f"error: {type(error).__name__}: {error}"[:500] + _place(error)}


def _place(error: Exception) -> str:
    """Return " (file:line)" of the verifier's innermost line, or "" if the error is not raised in one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def main() -> None:
    """Judge jobs until the connection closes; its file descriptor is the only argument.

    First message in: {"verifiers": {task: reference}, "memory_bytes", "seconds"}; first message out: {} or
    {"refused": why}. A verifier's module may have a function `prepare()`, which is called before that. Then
    lists of [task, answer, text] in, and a verdict per job out, in order. The process exits after a
    MemoryError, and when a job takes longer than `seconds` (if no pool is left to kill it).
    """
    pool = Connection(int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGUSR1):  # Ctrl-C and Slurm's warning are for the run to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    settings = json.loads(pool.recv_bytes())
    judging = threading.Event()
    sys.addaudithook(partial(_refuse_evaluation, judging))
    try:
        verifiers = {task: load_attribute(reference) for task, reference in settings["verifiers"].items()}
        for module in {sys.modules[verifier.__module__] for verifier in verifiers.values()}:
            getattr(module, "prepare", _nothing)()  # imports what it needs, before any job's time begins
    except Exception as error:
        pool.send_bytes(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode())
        return
    _limit_memory(settings["memory_bytes"])
    pool.send_bytes(b"{}")
    for task, answer, text in _jobs(pool):
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        judging.set()
        row = judge(verifiers[task], answer, text)
        judging.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        pool.send_bytes(json.dumps(row).encode())
        if row.get("failed") == "memory":
            return


def _jobs(pool: Connection) -> Iterator[tuple[str, str, str]]:
    while True:
        try:
            message = pool.recv_bytes()
        except (EOFError, ConnectionError):
            return
        yield from json.loads(message)


def _refuse_evaluation(judging: threading.Event, event: str, arguments: tuple) -> None:
    """Refuse, as an audit hook, to let a verifier or one of its libraries run a string as code.

    Code that creates classes, sympy's numbers and its arithmetic of monomials is allowed.
    """
    if event != "exec" or not judging.is_set():
        return
    frame = sys._getframe(1)
    caller = frame.f_globals.get("__name__", "")
    if caller in ("collections", "dataclasses", "sympy.polys.monomials"):
        return
    # only numerals, and no inner code: a comprehension has its own names
    is_flat = not any(isinstance(constant, CodeType) for constant in arguments[0].co_consts)
    if caller == "sympy.parsing.sympy_parser" and is_flat and set(arguments[0].co_names) <= NUMERALS:
        return
    while frame and frame.f_code is not judge.__code__:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":  # a module being imported
            return
        frame = frame.f_back
    raise PermissionError(f"{caller} tried to evaluate a string; model output is data")


def _nothing() -> None:
    pass


def _limit_memory(size: int) -> None:
    """Limit what jobs may allocate to `size` bytes; libraries may have mapped gigabytes before."""
    import resource

    pages = Path("/proc/self/statm").read_text().split()
    mapped, data = (int(pages[place]) * resource.getpagesize() for place in (0, 5))
    # Some systems keep only one of the two limits.
    for limit, used in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_AS, mapped)):
        hard = resource.getrlimit(limit)[1]
        wanted = used + size
        resource.setrlimit(limit, (wanted if hard < 0 else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
