"""Scorers for reasoning-gym's datasets whose own evaluate text as code (sympy's parse_expr) or are wrong.

Each returns True if the answer's text is right for the entry, and raises ValueError for malformed text.
"""

import ast
import json
import operator
from collections.abc import Callable
from typing import Any

Entry = dict[str, Any]
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_ELEMENTARY = "Abs exp log ln sqrt sin cos tan cot sec csc asin acos atan acot asec acsc"
_OTHERS = "sinh cosh tanh coth asinh acosh atanh erf erfi Ei Si Ci li"
_FUNCTIONS = {*_ELEMENTARY.split(), *_OTHERS.split()}
_CONSTANTS = {"pi": "pi", "E": "E"}


def expression(text: str) -> Any:
    """Build a sympy expression of numbers, names, + - * / ** and some functions; else raise ValueError.

    The text is read by Python's grammar; nothing is evaluated but the arithmetic.
    """
    import sympy

    def made(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return sympy.sympify(number)
            case ast.Name(id=name) if name in _CONSTANTS:
                return getattr(sympy, _CONSTANTS[name])
            case ast.Name(id=name):
                return sympy.Symbol(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](made(left), made(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -made(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return made(operand)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
                return getattr(sympy, name)(made(argument))
        raise ValueError(f"{type(node).__name__} is not allowed in an expression")

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:  # MemoryError: of the parser's stack
        raise ValueError(f"not an expression: {error}") from None
    try:
        return made(tree.body)
    except (RecursionError, ArithmeticError) as error:
        raise ValueError(str(error)) from None


def is_antiderivative(answer: str, entry: Entry) -> bool:
    """Compare the answer's derivative with the integrand."""
    import sympy

    variable, integrand = entry["metadata"]["variable"], entry["metadata"]["integrand"]
    derivative = sympy.diff(expression(answer), sympy.Symbol(variable))
    return sympy.simplify(derivative - expression(integrand)) == 0


def is_same_polynomial(answer: str, entry: Entry) -> bool:
    """Compare with the expanded product, as written."""
    return expression(answer) == expression(entry["answer"])


def is_same_integer(answer: str, entry: Entry) -> bool:
    """Compare integers, decimal or with a prefix (0x, 0b, 0o)."""
    return int(answer, 0) == int(entry["answer"], 0)


def is_same_word(answer: str, entry: Entry) -> bool:
    """Compare texts; the library treats any text as True."""
    return answer == str(entry["answer"])


def is_same_list(answer: str, entry: Entry) -> bool:
    """Compare JSON lists of numbers, or of numbers as strings in either quotes."""
    given, right = (json.loads(text.replace("'", '"')) for text in (answer, entry["answer"]))
    if not isinstance(given, list):
        raise ValueError("not a list")
    numbers = [float(str(number)) for number in given]  # str: true is not 1
    return numbers == [float(number) for number in right]


SCORERS: dict[str, Callable[[str, Entry], bool]] = {
    "bitwise_arithmetic": is_same_integer,
    "game_of_life_halting": is_same_word,
    "intermediate_integration": is_antiderivative,
    "number_sorting": is_same_list,
    "polynomial_multiplication": is_same_polynomial,
    "simple_integration": is_antiderivative,
}
