"""Define verifiers that misbehave, for the pool's tests; worker processes load this file."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import sys
import time

from megatron_srpo.data.records import Verdict


def misbehave(answer: str, text: str) -> Verdict:
    """Do what the text says; otherwise accept it when it equals the answer."""
    if text == "hang":
        while True:
            pass
    if text == "hang deaf":  # ignores every signal that can be ignored, and sleeps
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(3600)
    if text == "die":
        os._exit(3)
    if text == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "eat":
        held = []
        while True:
            held.append(bytearray(64 << 20))
    if text == "raise":
        raise KeyError("a bug")
    if text == "recurse":
        return misbehave(answer, text)
    if text == "nothing":
        return None
    if text == "nan":
        return Verdict(reward=float("nan"), correct=False, format_ok=True)
    if text == "contradict":
        return Verdict(reward=0.9, correct=False, format_ok=True)
    if text == "surrogate":
        return Verdict(reward=0.0, correct=False, format_ok=True, feedback="\ud800")
    if text.startswith("eval "):
        return Verdict(reward=float(eval(text[5:])), correct=True, format_ok=True)
    if text.startswith("compile "):
        return Verdict(reward=float(eval(compile(text[8:], __file__, "eval"))), correct=True, format_ok=True)
    if text.startswith("sympy "):
        from sympy.parsing.sympy_parser import parse_expr

        return Verdict(reward=float(parse_expr(text[6:])), correct=True, format_ok=True)
    if text == "classes":  # lazy imports do not evaluate output
        collections.namedtuple("Pair", "a b")
        dataclasses.make_dataclass("Made", ["a"])
    if text == "chatter":
        print("x" * 100_000)
        sys.stderr.write("y" * 100_000)
        os.write(1, b'{"reward": 1}\n' * 1000)
    if text == "modules":
        return Verdict(reward=0.0, correct=False, format_ok=True, feedback=" ".join(sorted(sys.modules)))
    correct = text == answer
    return Verdict(reward=float(correct), correct=correct, format_ok=True, feedback=str(os.getpid()))


broken = 1 / 0 if "BREAK" in os.environ else None
