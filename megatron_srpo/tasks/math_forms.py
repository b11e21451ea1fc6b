r"""The form of a short answer: a quantity with its unit, text, a list, a set, an interval or an equation.

Answers are read here before a parser of LaTeX sees them, because such parsers take words for products of
letters, drop units and forget the order of lists.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from megatron_srpo.tasks.math_units import split_unit

LONGEST_LIST = 100


class Atom(NamedTuple):
    """An expression as LaTeX, and its unit if it has one."""

    latex: str
    unit: str | None = None


class Words(NamedTuple):
    """Text, compared as text."""

    text: str


class Items(NamedTuple):
    """Several answers. kind: "list", "set", "matrix", "ratio", or the brackets: "()", "[]", "(]", "[)"."""

    kind: str
    items: tuple["Form", ...]


class Relation(NamedTuple):
    r"""Sides joined by relations: "=", "\approx", "<", ">", "\le", "\ge" or "\ne"."""

    sides: tuple["Form", ...]
    signs: tuple[str, ...]


Form = Atom | Words | Items | Relation

_SYMBOLS = {
    **dict(zip("½⅓⅔¼¾⅕⅙⅛", ("1/2", "1/3", "2/3", "1/4", "3/4", "1/5", "1/6", "1/8"), strict=True)),
    "∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "−": "-", "–": "-",
    "÷": "/", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "ω": r"\omega ", "φ": r"\phi ",
    "∠": r"\angle ", "△": r"\triangle ",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "ℝ": r"\mathbb{R}", "′": "'", "“": '"', "”": '"',
    "µ": "u", "μ": r"\mu ", "Ω": r"\Omega ",
}  # fmt: skip
_FRACTIONS = re.compile("[½⅓⅔¼¾⅕⅙⅛]")
_DIGITS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))
_POWER = re.compile(f"[{''.join(_DIGITS)}]+")
_ROOT = re.compile(r"√\s*(?:(\d+|[a-zA-Z])|\(([^()]*)\)|\{([^{}]*)\})")
_DISPLAY = re.compile(r"\\\[(.*)\\\]|\\\((.*)\\\)|\$\$(.*)\$\$|\$(.*)(?<!\\)\$", re.DOTALL)
_FULL_STOP = re.compile(r"(?<![.\\])(?<!\\right)\.$")
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|~|\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])"
)
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?")
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant|le)(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:approx|simeq|sim)(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\[lr]angle(?![a-zA-Z])"), lambda match: "()"[match.group()[1] == "r"]),
    (re.compile(r"\\(?:varnothing)(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\^\{?\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\cdotp(?![a-zA-Z])|\*(?!\*)"), r"\\cdot "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mbox|mathrm|mathbf|mathit|mathsf|operatorname|rm|unit)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?! ?\d)")
_JOINED = re.compile(r"\s*(?:,|;)?\s*\b(?:or|and)\b\s*|\s*[,;]\s*", re.IGNORECASE)
_SIGNS = re.compile(r"\\(?:le|ge|ne|approx) |[=<>]")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd lcm sqrt pi mod"
        " det deg dim ker lim inf sup frac cdot times",
    )
)
_GEOMETRY = re.compile(
    r"\\(?:triangle|angle|square|arc|vec|over(?:line|rightarrow|leftrightarrow))(?![a-zA-Z])"
)
_REALS = r"(-\infty, \infty)"
_MATRIX = re.compile(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)


def bare(answer: str) -> str:
    """Remove a formula's delimiters and a full stop, and write each symbol in one way."""
    answer = _FULL_STOP.sub("", answer.strip())
    if around := _DISPLAY.fullmatch(answer):
        inner = next(part for part in around.groups() if part is not None)
        if "$" not in inner.replace(r"\$", ""):
            answer = _FULL_STOP.sub("", inner.strip())
    answer = _FRACTIONS.sub(
        lambda match: rf"\frac{{{_SYMBOLS[match[0]][0]}}}{{{_SYMBOLS[match[0]][2]}}}", answer
    )
    answer = _POWER.sub(lambda match: f"^{{{''.join(map(_DIGITS.__getitem__, match[0]))}}}", answer)
    answer = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}", answer)
    answer = "".join(_SYMBOLS.get(character, character) for character in answer)
    answer = _SIZES.sub("", _SPACING.sub(" ", answer))
    for pattern, replacement in _SYNONYMS:
        answer = pattern.sub(replacement, answer)
    return re.sub(r"\s+", " ", answer).strip()


def form_of(answer: str) -> Form:
    """Return the form of a bare answer."""
    answer = answer.strip()
    if answer in (r"\mathbb{R}", r"\mathbf{R}", r"\R"):
        answer = _REALS
    if wrapped := _WRAPPED.fullmatch(answer):
        return form_of(wrapped[1])
    if outward := re.fullmatch(r"\]([^\[\]]*)\[", answer):  # ]0, 1[ is written (0, 1) elsewhere
        answer = f"({outward[1]})"
    if matrix := _MATRIX.fullmatch(answer):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()][:LONGEST_LIST]
        return Items("matrix", tuple(Items("row", tuple(map(form_of, row.split("&")))) for row in rows))
    if _is_grouped(answer):
        answer = _GROUPED.sub(lambda match: match[0].replace(",", ""), answer)
    answer = _SPACED.sub(lambda match: match[0].replace(" ", ""), answer)
    parts = _split(_unwrapped_joints(answer), _JOINED)
    if len(parts) > 1:
        return Items(_kind_of_list(answer), tuple(map(form_of, parts[:LONGEST_LIST])))
    if len(unions := _split(answer, re.compile(r"\\cup(?![a-zA-Z])"))) > 1:
        return Items("set", tuple(map(form_of, unions)))
    if member := re.fullmatch(r"\s*[a-zA-Z]\s*\\in(?![a-zA-Z])(.*)", answer):
        return form_of(member[1])
    return _bracketed(answer) or _related(answer) or _single(answer)


def _is_grouped(answer: str) -> bool:
    """Return True if every comma is one between thousands, as in 1,234; in brackets they separate items."""
    return (
        "," in answer
        and answer[0] not in "(["
        and not answer.startswith(r"\{")
        and "," not in _GROUPED.sub("", answer)
    )


def _unwrapped_joints(answer: str) -> str:
    return _WRAPPED.sub(
        lambda match: f" {match[1].strip()} " if _JOINED.search(match[1]) else match[0], answer
    )


def _kind_of_list(answer: str) -> str:
    """Return "union" for `x < 1 or x > 3`, else "list"."""
    is_union = re.search(r"\bor\b", answer) and all(
        sign in "<>" or sign in (r"\le ", r"\ge ") for sign in _SIGNS.findall(answer)
    )
    return "set" if is_union and _SIGNS.search(answer) else "list"


def _split(answer: str, separator: re.Pattern[str]) -> list[str]:
    """Split at separators outside of brackets; empty parts are left out."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(answer):
        character = answer[place]
        if character == "\\" and answer[place + 1 : place + 2] in "{}":
            depth += 1 if answer[place + 1 : place + 2] == "{" else -1
            place += 2
            continue
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and (match := separator.match(answer, place)) and match.end() > place:
            parts.append(answer[start:place])
            start = place = match.end()
            continue
        place += 1
    return [part for part in (*parts, answer[start:]) if part.strip()]


def _bracketed(answer: str) -> Form | None:
    pairs = ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"))
    for opening, closing in pairs:
        if not (answer.startswith(opening) and answer.endswith(closing) and len(answer) > len(opening)):
            continue
        inner = answer[len(opening) : len(answer) - len(closing)]
        parts = _split(inner, re.compile(r"\s*[,;]\s*"))
        if opening == r"\{":
            is_plain = "|" not in inner and r"\mid" not in inner and r"\}" not in inner and r"\{" not in inner
            return Items("set", tuple(map(form_of, parts))) if parts and is_plain else None
        if len(parts) > 1 and _is_closed(inner):
            return Items(opening + closing, tuple(map(form_of, parts)))
    return None


def _is_closed(inner: str) -> bool:
    """Return True if no bracket closes in `inner` that does not open there."""
    depth = 0
    for character in inner:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            return False
    return True


def _related(answer: str) -> Form | None:
    signs = tuple(sign.strip() for sign in _split_signs(answer))
    sides = _split(answer, _SIGNS)
    if not signs or len(sides) != len(signs) + 1:
        return None
    return Relation(tuple(_single(side.strip()) for side in sides), signs)


def _split_signs(answer: str) -> Sequence[str]:
    return _SIGNS.findall(answer)


def _single(answer: str) -> Form:
    answer, unit = split_unit(_WRAPPED.sub(r" «\1» ", answer).strip())
    if answer.count(r"\pm") == 1 and "«" not in answer:
        signs = (answer.replace(r"\pm", "+").strip().removeprefix("+"), answer.replace(r"\pm", "-"))
        return Items("set", tuple(Atom(signed, unit) for signed in signs))
    if unit is not None:
        return Atom(answer, unit)
    text = re.sub("[«»]", "", answer)
    text = re.sub(r"\s+", " ", text).strip()
    if choice := re.fullmatch(r"\(?([A-Za-z])\)?", text):
        return Atom(choice[1])
    if re.fullmatch(r"\d+(?: ?: ?\d+)+", text):
        return Items("ratio", tuple(Atom(part.strip()) for part in text.split(":")))
    if (
        re.search(r"(?<![_^\d}])\d+ \d(?!\d* ?/)", text)
        or re.fullmatch(r"\w+_\{?\d+\}?", text)
        and text[0].isdigit()
    ):
        return Words(text)  # digits apart, and numbers with their base
    if text.lower().lstrip("+-") == "infinity":
        return Atom(text.lower().replace("infinity", r"\infty"))
    if re.search("[A-Z]{2}", text) and re.fullmatch(r"[A-Z\s{}]+", _GEOMETRY.sub("", text)) and "\\" in text:
        return Words(text)
    plain = _COMMAND.sub("", text)
    words = [word for word in _LETTERS.findall(text) if word.lower() not in FUNCTIONS]
    if (
        "«" in answer
        or (words and not re.search(r"[0-9+\-*/^_=\\(]", text))
        or any(len(word) > 4 for word in words)
    ):
        return Words(text)
    if re.fullmatch(r"[a-zA-Z](?: [a-zA-Z])+", plain) and plain == text:  # letters with spaces between
        return Words(text.replace(" ", ""))
    return Atom(text)
