"""Test our scorers for some of reasoning-gym's datasets, without reasoning-gym.

The entries are made by hand, in the form that it gives them.
"""

from __future__ import annotations

import contextlib

import pytest
from tables import each_row

from megatron_srpo.tasks.procedural_scorers import SCORERS, expression

INTEGRAL = {"answer": "x**3 + sin(2*x)/2", "metadata": {"variable": "x", "integrand": "3*x**2 + cos(2*x)"}}
PRODUCT = {"answer": "x**2*y - x*y - 2*y", "metadata": {}}
LIST = {"answer": "['2', '1.5', '-3']", "metadata": {"direction": "descending"}}


@each_row(
    "dataset, entry, answer, right",
    [
        ("simple_integration", INTEGRAL, "x**3 + sin(2*x)/2 + C", True),
        ("intermediate_integration", INTEGRAL, "sin(x)*cos(x) + x**3 - 7 + K", True),
        ("simple_integration", INTEGRAL, "x**3 + sin(2*x)", False),
        ("simple_integration", INTEGRAL, "1/0", False),
        ("simple_integration", INTEGRAL, "0*(1/0)", False),
        ("simple_integration", INTEGRAL, "0.5*sin(2*x) + x*x*x", True),
        ("polynomial_multiplication", PRODUCT, "-2*y - y*x + y*x**2", True),
        ("polynomial_multiplication", PRODUCT, "y*(x + 1)*(x - 2)", False),  # not multiplied out
        ("polynomial_multiplication", PRODUCT, "x**2*y - x*y + 2*y", False),
        ("bitwise_arithmetic", {"answer": "-0x1f"}, "-0x1f", True),
        ("bitwise_arithmetic", {"answer": "-0x1f"}, "-31", True),
        ("bitwise_arithmetic", {"answer": "-0x1f"}, "0x1f", False),
        ("game_of_life_halting", {"answer": "False"}, "False", True),
        ("game_of_life_halting", {"answer": "False"}, "True", False),
        ("game_of_life_halting", {"answer": "True"}, "anything", False),
        ("number_sorting", LIST, "['2', '1.5', '-3']", True),
        ("number_sorting", LIST, '["2.0", "1.50", "-3"]', True),
        ("number_sorting", LIST, "['1.5', '2', '-3']", False),
        ("number_sorting", LIST, "['2', '1.5']", False),
    ],
)
def test_right_and_wrong(dataset, entry, answer, right):
    assert bool(SCORERS[dataset](answer, entry)) == right


@each_row(
    "text",
    [
        *(
            "",
            "x +",
            "x; y",
            "x = 1",
            "(",
            "__import__('os')",
            "x.__class__",
            "[x]",
            "lambda: x",
            "f'{x}'",
            "x if y else z",
            "True",
            "1j",
        ),
        *("sin(x, y)", "sin(x=1)", "eval('x')", "sympify('x')", "'x'", "x[0]", "x(1)", "x @ y"),
        *("(" * 500 + "x" + ")" * 500, "-" * 100_000 + "x"),
        *("x" + "+x" * 100_000, "9" * 100_000, "9" * 5_000 + ".x"),
    ],
)
def test_what_is_no_expression_is_not_evaluated(text):
    with pytest.raises(ValueError):
        expression(text)


ENTRIES = {
    **{
        "simple_integration": INTEGRAL,
        "intermediate_integration": INTEGRAL,
        "polynomial_multiplication": PRODUCT,
        "number_sorting": LIST,
    },
    **{"bitwise_arithmetic": {"answer": "0x5"}, "game_of_life_halting": {"answer": "True"}},
}


@each_row("dataset", SCORERS)
@each_row("text", ["", "zzz zzz", "[1, 2", "{}", "None", "0xyz", "\x00", "[null]", "[[]]"])
def test_text_without_form_is_wrong_or_raises_what_is_caught(dataset, text):
    with contextlib.suppress(ValueError, TypeError):
        assert not SCORERS[dataset](text, ENTRIES[dataset])
