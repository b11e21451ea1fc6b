r"""Equality of short answers: numbers by value and relatively, units by name, text as text, lists in order.

Only expressions with letters, roots and functions are parsed as LaTeX, by math-verify. Nothing is rounded to
a number of decimals: two decimals are equal if they agree in all digits of the shorter one, in six at least.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_srpo.tasks.math_forms import Atom, Form, Items, Relation, Words, bare, form_of

DIGITS = 6  # significant digits in which decimals agree at least
LARGEST_EXPONENT = 5_000  # of ten
LONGEST_NUMBER = 400  # digits
_TINY = Fraction(1, 10**80)  # relative difference of exact values, which are computed to 100 digits
_PLAIN = re.compile(r"([+-]?)\s*(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?")
_SCIENTIFIC = re.compile(
    r"([+-]?)\s*(?:(\d+\.?\d*|\.\d+)\s*(?:\\times|\\cdot|x)\s*)?"
    r"10\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|([+-]?\d+))"
)
_QUOTIENT = re.compile(r"([+-]?)\s*(?:(\d+)\s*\\frac|\\frac)\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*([+-]?\d+)\s*\}")
_SHORT_QUOTIENT = re.compile(r"([+-]?)\s*(\d*)\s*\\frac\s*(\d)\s*(\d)|([+-]?)()(\d+)\s*/\s*(\d+)")
_MIXED = re.compile(r"([+-]?)\s*(\d+) (\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_NAME = re.compile(
    r"[a-zA-Z](?: ?[+-] ?[a-zA-Z])+|\\?[a-zA-Z]+'*(?:_(?:\w|\{[^{}]*\}))?(?:\s?\([^()\d]*\)|\s?[A-Z]{1,4})?"
)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


class Number(NamedTuple):
    """A rational number; `digits` are the significant ones of a decimal, None for an exact number."""

    value: Fraction
    digits: int | None = None


def equal(gold: str, given: str, tolerance: Fraction | None = None) -> bool:
    """Return True if the answer `given` means `gold`; tolerance: absolute, as the data set states it."""
    gold, given = bare(gold), bare(given)
    if _closed_up(gold) == _closed_up(given):
        return True
    return _same(_read(gold), _read(given), tolerance)


def _closed_up(answer: str) -> str:
    """Remove spaces, but not those between digits."""
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", answer)


@lru_cache(maxsize=4096)  # every gold answer is compared with all samples of a group
def _read(answer: str) -> Form:
    return form_of(answer)


def _same(gold: Form, given: Form, tolerance: Fraction | None = None) -> bool:
    if isinstance(given, Relation) and not isinstance(gold, Relation):
        interval = _interval(given)
        if interval is not None:
            return isinstance(gold, Items) and _same_items(gold, interval, tolerance)
        return _value_of_chain(given, gold, tolerance)
    if isinstance(gold, Relation) or isinstance(given, Relation):
        return isinstance(gold, Relation) and _same_relation(gold, given, tolerance)
    if isinstance(gold, Items) or isinstance(given, Items):
        return isinstance(gold, Items) and isinstance(given, Items) and _same_items(gold, given, tolerance)
    if isinstance(gold, Words) and isinstance(given, Words):
        return _same_words(gold.text, given.text)
    if isinstance(gold, Words) or isinstance(given, Words):
        return _product_of_letters(gold, given)
    return _same_quantity(gold, given, tolerance)


def _same_words(gold: str, given: str) -> bool:
    first, second = re.sub(r"[\W_]+", " ", gold).split(), re.sub(r"[\W_]+", " ", given).split()
    if len(first) != len(second) or not first:
        return False
    return all(one == other or _same_word(one, other) for one, other in zip(first, second, strict=True))


def _same_word(one: str, other: str) -> bool:
    is_long = len(one) > 3 or one.lower() in ("yes", "no", "odd", "all", "any", "the", "is", "a")
    return is_long and one.lower() == other.lower()


def _product_of_letters(gold: Form, given: Form) -> bool:
    r"""Compare `xy` with `x \cdot y`, which says that it is a product."""
    text, other = (gold, given) if isinstance(gold, Words) else (given, gold)
    assert isinstance(text, Words) and isinstance(other, Atom)
    is_product = re.fullmatch(r"[a-zA-Z]{2,4}", text.text) and re.search(r"\\cdot|\\times|\^", other.latex)
    return bool(is_product) and other.unit is None and _same_expression(text.text, other.latex)


def _same_items(gold: Items, given: Items, tolerance: Fraction | None) -> bool:
    if gold.kind == "set" and given.kind in ("set", "list", "()"):
        return _same_set(gold.items, given.items, tolerance)
    is_tuple = {gold.kind, given.kind} <= {"()", "list"} or (gold.kind, given.kind) == ("list", "set")
    if gold.kind != given.kind and not is_tuple or len(gold.items) != len(given.items):
        return False
    return all(_same(one, other, tolerance) for one, other in zip(gold.items, given.items, strict=True))


def _same_set(gold: tuple[Form, ...], given: tuple[Form, ...], tolerance: Fraction | None) -> bool:
    left = list(given)
    for one in gold:
        found = next((place for place, other in enumerate(left) if _same(one, other, tolerance)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _same_quantity(gold: Atom, given: Atom, tolerance: Fraction | None) -> bool:
    if gold.unit == given.unit:
        return _same_expression(gold.latex, given.latex, tolerance)
    if "%^1" in (gold.unit, given.unit) and None in (gold.unit, given.unit):
        return _same_percent(gold, given, tolerance)
    if gold.unit is not None and given.unit is not None:
        return False
    return _same_expression(gold.latex, given.latex, tolerance)


def _same_percent(gold: Atom, given: Atom, tolerance: Fraction | None) -> bool:
    """Compare 50 % with 0.5, which it is, and with 50, where the question asks for per cent."""
    percent, plain = (gold, given) if gold.unit else (given, gold)
    if _same_expression(rf"\frac{{{percent.latex}}}{{100}}", plain.latex, tolerance):
        return True
    value = number_of(percent.latex)
    is_large = gold.unit is not None or (value is not None and abs(value.value) >= 1)
    return is_large and _same_expression(gold.latex, given.latex, tolerance)


# ---- equations and inequalities


def _value_of_chain(given: Relation, gold: Form, tolerance: Fraction | None) -> bool:
    r"""Compare the value of `x = 5`, `x = 3 + 2 = 5` or `\sqrt{2} \approx 1.414`, whose sides must agree."""
    if not set(given.signs) <= {"=", "\\approx"}:
        return False
    sides, signs = list(given.sides), list(given.signs)
    if _is_name(sides[0]):
        sides, signs = sides[1:], signs[1:]
    for one, sign, other in zip(sides, signs, sides[1:], strict=False):
        if not (_same(one, other) or (sign == "\\approx" and _is_rounded(one, other))):
            return False
    return any(_same(gold, side, tolerance) for side in sides)


def _is_name(side: Form) -> bool:
    r"""Return True for x, x_1, f(x), m + n, "area": what an answer may be called."""
    if isinstance(side, Words):
        return True
    if not isinstance(side, Atom) or side.unit is not None or side.latex in (r"\pi", "e", "i", r"\infty"):
        return False
    return _NAME.fullmatch(side.latex) is not None


def _is_rounded(exact: Form, rounded: Form) -> bool:
    """Return True if a decimal of two digits or more is the rounded value of `exact`."""
    if not isinstance(exact, Atom) or not isinstance(rounded, Atom):
        return False
    decimal, value = number_of(rounded.latex), _value(exact.latex)
    if decimal is None or value is None or (decimal.digits or 0) < 2:
        return False
    return abs(decimal.value - value) <= _unit_of_last_digit(decimal.value, decimal.digits or 2) / 2


def _interval(relation: Relation) -> Items | None:
    r"""Return 0 < x \le 5 as (0, 5], and x > 3 as (3, \infty); None if it is no interval of one letter."""
    sides, signs = list(relation.sides), list(relation.signs)
    if not set(signs) <= set(_FLIPPED) or not all(isinstance(side, Atom) for side in sides):
        return None
    if len(sides) == 2:
        name = next((place for place in (0, 1) if _is_name(sides[place])), None)
        if name is None or _is_name(sides[1 - name]):
            return None
        sign = signs[0] if name == 0 else _FLIPPED[signs[0]]
        bound = sides[1 - name]
        if sign in (">", "\\ge"):
            return Items("[)" if sign == "\\ge" else "()", (bound, Atom(r"\infty")))
        return Items("(]" if sign == "\\le" else "()", (Atom(r"-\infty"), bound))
    if len(sides) != 3 or not _is_name(sides[1]):
        return None
    if set(signs) <= {">", "\\ge"}:
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
    if not set(signs) <= {"<", "\\le"}:
        return None
    kind = ("[" if signs[0] == "\\le" else "(") + ("]" if signs[1] == "\\le" else ")")
    return Items(kind, (sides[0], sides[2]))


def _same_relation(gold: Relation, given: Form, tolerance: Fraction | None) -> bool:
    interval = _interval(gold)
    if isinstance(given, Relation):
        if interval is not None and (other := _interval(given)) is not None:
            return _letters(gold) == _letters(given) and _same_items(interval, other, tolerance)
        return _same_equation(gold, given, tolerance)
    if interval is not None:
        return isinstance(given, Items) and _same_items(interval, given, tolerance)
    if set(gold.signs) <= {"=", "\\approx"} and _is_name(gold.sides[0]):
        return _same(gold.sides[-1], given, tolerance)
    return False


def _letters(form: Form) -> set[str]:
    if isinstance(form, Relation):
        return set().union(*map(_letters, form.sides))
    return set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]", form.latex)) if isinstance(form, Atom) else set()


def _same_equation(gold: Relation, given: Relation, tolerance: Fraction | None) -> bool:
    is_equation = "=" in gold.signs and set(gold.signs + given.signs) <= {"=", "\\approx"}
    if is_equation and _is_name(gold.sides[0]) and _is_name(given.sides[0]):
        if not _same(gold.sides[0], given.sides[0]):
            return False
        rest = list(given.sides[1:])
        value = Relation(tuple(rest), given.signs[1:]) if len(rest) > 1 else rest[0]
        if _same(gold.sides[-1], value, tolerance):
            return True
    if len(gold.sides) != 2 or len(given.sides) != 2:
        return False
    return _is_multiple(gold, given)


def _is_multiple(gold: Relation, given: Relation) -> bool:
    """Compare 2x = 4y with x - 2y = 0: one difference of the sides is a constant multiple of the other."""
    differences = []
    for relation in (gold, given):
        left, right = relation.sides
        if not isinstance(left, Atom) or not isinstance(right, Atom) or left.unit or right.unit:
            return False
        first, second = _parsed(left.latex), _parsed(right.latex)
        if first is None or second is None:
            return False
        differences.append(first - second)
    if not _same_case(_text(gold), _text(given)):
        return False
    ratio = _constant_ratio(*differences)
    if ratio is None:
        return False
    signs = (gold.signs[0], given.signs[0])
    if signs[0] in ("=", "\\ne"):
        return signs[0] == signs[1]
    return signs[1] == (signs[0] if ratio > 0 else _FLIPPED.get(signs[0]))


def _text(relation: Relation) -> str:
    return " ".join(side.latex for side in relation.sides if isinstance(side, Atom))


def _constant_ratio(first: Any, second: Any) -> Any:
    import sympy

    if first.free_symbols != second.free_symbols or second == 0:
        return None
    ratio = sympy.simplify(first / second)
    return ratio if ratio.is_real and ratio.is_number and ratio != 0 else None


# ---- numbers


def number_of(text: str) -> Number | None:
    r"""Return the number of a numeral: 12, 1.5, 8.7e8, 1.6 \times 10^{-19}, 3/4, 2\frac12, 0.\overline{3}."""
    text = text.strip().strip("{}").strip() if re.fullmatch(r"\{[^{}]*\}", text.strip()) else text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    if match := _PLAIN.fullmatch(text):
        return _decimal(match[1], match[2], match[3] or "0")
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = (match[3] or match[4]).replace(" ", "")
        return _decimal(match[1], match[2] or "1", exponent, is_exact=match[2] is None)
    for pattern in (_QUOTIENT, _SHORT_QUOTIENT, _MIXED):
        if match := pattern.fullmatch(text):
            groups = [group for group in match.groups() if group is not None]
            sign, count = groups[0], groups[1] if len(groups) > 3 else ""
            top, bottom = int(groups[-2]), int(groups[-1])
            if bottom == 0:
                return None
            value = int(count or 0) + Fraction(top, bottom)
            return Number(-value if sign == "-" else value)
    if match := _REPEATING.fullmatch(text):
        fixed, repeated = match[3], match[4]
        nines = (10 ** len(repeated) - 1) * 10 ** len(fixed)
        value = Fraction(int((match[2] or "0") + fixed), 10 ** len(fixed)) + Fraction(int(repeated), nines)
        return Number(-value if match[1] == "-" else value)
    return None


def _decimal(sign: str, digits: str, exponent: str, is_exact: bool = False) -> Number | None:
    if len(exponent) > 6 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    value = Fraction(f"{sign}{digits}") * Fraction(10) ** int(exponent)
    if is_exact or ("." not in digits and exponent == "0"):
        return Number(value)
    return Number(value, len(digits.replace(".", "").lstrip("0")) or 1)


def _same_number(one: Number, other: Number, tolerance: Fraction | None) -> bool:
    if one.value == other.value or (tolerance is not None and abs(one.value - other.value) <= tolerance):
        return True
    if one.digits is None and other.digits is None or 0 in (one.value, other.value):
        return False
    if any(number.digits is None and number.value.denominator == 1 for number in (one, other)):
        return False  # a whole number is exact
    digits = max(DIGITS, min(number.digits for number in (one, other) if number.digits is not None))
    return _rounded(one.value, digits) == _rounded(other.value, digits)


def _unit_of_last_digit(value: Fraction, digits: int) -> Fraction:
    value = abs(value)
    if value == 0:
        return Fraction(0)
    power = math.floor((value.numerator.bit_length() - value.denominator.bit_length()) * math.log10(2)) - 1
    while value >= Fraction(10) ** (power + 1):
        power += 1
    return Fraction(10) ** (power - digits + 1)


def _rounded(value: Fraction, digits: int) -> Fraction:
    unit = _unit_of_last_digit(value, digits)
    return round(value / unit) * unit


# ---- expressions


def _same_expression(gold: str, given: str, tolerance: Fraction | None = None) -> bool:
    if _closed_up(gold) == _closed_up(given):
        return True
    one, other = number_of(gold), number_of(given)
    if one is not None and other is not None:
        return _same_number(one, other, tolerance)
    if (
        not _same_case(gold, given)
        or "«" in gold + given
        or r"\approx" in gold + given
        or "0^0" in gold + given
    ):
        return False
    first, second = _expression(gold, one), _expression(given, other)
    if first is None or second is None:
        return False
    if first.free_symbols or second.free_symbols:
        return first.free_symbols == second.free_symbols and _same_function(first, second)
    return _same_value(first, second, one, other, tolerance)


def _expression(latex: str, number: Number | None) -> Any:
    """Return the sympy expression; a number keeps the value that was read here."""
    if number is None:
        return _parsed(latex)
    import sympy

    return sympy.Rational(number.value.numerator, number.value.denominator)


def _same_case(gold: str, given: str) -> bool:
    """Return True unless a letter's case differs, which the parser ignores (R and r are two names)."""
    first, second = (set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", text)) for text in (gold, given))
    letters = [{letter for run in runs for letter in run} for runs in (first, second)]
    both = letters[0] | letters[1]
    return not any(letter.swapcase() in both for letter in both)


@lru_cache(maxsize=4096)
def _parsed(latex: str) -> Any:
    """Return the sympy expression of a formula, or None."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Expr, I

    degrees = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"{(\1\\cdot\\frac{\\pi}{180})}", latex)
    no_limit: Any = None  # the pool limits the time; the library's own limit needs the main thread's signals
    # Without its removal of units, which takes letters for them.
    cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    extraction = [LatexExtractionConfig(normalization_config=cleaning)]
    found = parse(f"${degrees}$", extraction_config=extraction, parsing_timeout=no_limit)
    if not found or not isinstance(found[0], Expr):
        return None
    return found[0].subs({symbol: I for symbol in found[0].free_symbols if str(symbol) == "i"})


def _value(latex: str) -> Fraction | None:
    number = number_of(latex)
    if number is not None:
        return number.value
    expression = _parsed(latex)
    if expression is None or expression.free_symbols:
        return None
    real, imaginary = _evaluated(expression) or (None, 0)
    return real if imaginary == 0 else None


def _evaluated(expression: Any) -> tuple[Fraction, Fraction] | None:
    """Return real and imaginary part, to the last whole digit and 100 digits; None if not finite or huge."""
    import sympy

    size = sympy.N(abs(expression), 15)
    if not size.is_Float or not size.is_finite or size > sympy.Float(10) ** LARGEST_EXPONENT:
        return None
    digits = 100 + max(0, int(sympy.log(size, 10)) if size > 1 else 0)
    real, imaginary = sympy.N(expression, digits).as_real_imag()
    return _fraction(real, digits), _fraction(imaginary, digits)


def _fraction(number: Any, digits: int) -> Fraction:
    import sympy

    exact: Any = sympy.Rational(sympy.Float(number, digits))
    return Fraction(int(exact.p), int(exact.q))


def _same_value(
    first: Any, second: Any, one: Number | None, other: Number | None, tolerance: Fraction | None
) -> bool:
    import sympy

    infinite = {sympy.oo, -sympy.oo}
    if first in infinite or second in infinite:
        return first == second
    one_value, other_value = _evaluated(first), _evaluated(second)
    if one_value is None or other_value is None:
        return False
    decimals = [number.digits for number in (one, other) if number is not None and number.digits is not None]
    if first.has(sympy.Float) and one is None or second.has(sympy.Float) and other is None:
        decimals.append(DIGITS)
    size = max(map(abs, (*one_value, *other_value)))
    for left, right in zip(one_value, other_value, strict=True):
        if abs(left - right) <= min(size, 1) * _TINY or (
            tolerance is not None and abs(left - right) <= tolerance
        ):
            continue
        digits = max(DIGITS, *decimals) if len(decimals) == 1 else max(DIGITS, min(decimals, default=0))
        if not decimals or 0 in (left, right) or _rounded(left, digits) != _rounded(right, digits):
            return False
    return True


def _same_function(first: Any, second: Any) -> bool:
    """Compare two expressions of the same letters at points, and symbolically where they have no values."""
    import sympy

    relative = Fraction(1, 10**DIGITS) if first.has(sympy.Float) or second.has(sympy.Float) else _TINY
    names, seen = sorted(first.free_symbols, key=str), 0
    for shift in range(4):
        sign = -1 if shift == 3 else 1
        point = {
            name: sympy.Rational(sign * (17 + 13 * place + 7 * shift), 11 + 2 * shift)
            for place, name in enumerate(names)
        }
        left, right = _evaluated(first.subs(point)), _evaluated(second.subs(point))
        if left is None and right is None:
            continue
        if left is None or right is None:
            return False
        seen += 1
        size = max(abs(part) for part in (*left, *right))
        if any(abs(one - other) > size * relative for one, other in zip(left, right, strict=True)):
            return False
    return seen > 0 or sympy.simplify(first - second) == 0
