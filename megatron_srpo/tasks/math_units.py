r"""Units behind numbers: `24 minutes`, `9.8 \text{ m/s}^2`, `45^\circ`, `\$18`, `50\%`."""

import re

_SYMBOLS = set(
    re.findall(
        r"\w+",
        "m cm mm km nm um pm fm g kg mg ug s ms us ns min h hr hrs J kJ MJ eV keV MeV GeV N kN W kW MW V"
        " kV mV A mA C K F Pa kPa MPa atm bar Hz kHz MHz GHz mol L l mL ml dL T G Wb H rad sr lm lx cd Bq"
        " Gy Sv AU ly pc kpc Mpc ft in yd mi mph kmph kph lb lbs oz gal pt qt M dB erg dyn dyne cal kcal"
        " Ry sq cu cc am pm deg sec wk yr yrs mo USD EUR GBP cents",
    )
)
_ALIASES = {
    "minute": "min", "second": "s", "sec": "s", "hour": "h", "hr": "h", "hrs": "h", "meter": "m",
    "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg", "milligram": "mg", "liter": "L",
    "litre": "L", "l": "L", "ml": "mL", "milliliter": "mL", "dollar": "$", "usd": "$", "cent": "cents",
    "degree": "°", "deg": "°", "percent": "%", "joule": "J", "newton": "N", "watt": "W", "volt": "V",
    "ampere": "A", "kelvin": "K", "pascal": "Pa", "hertz": "Hz", "mole": "mol", "radian": "rad",
    "foot": "ft", "feet": "ft", "inch": "in", "inches": "in", "yard": "yd", "mile": "mi", "pound": "lb",
    "lbs": "lb", "ounce": "oz", "euro": "€", "yr": "year", "yrs": "year", "people": "person", "men": "man",
    "women": "woman", "children": "child", "electronvolt": "eV", "tesla": "T", "coulomb": "C", "farad": "F",
    "ohm": "Ω", "per": "/",
}  # fmt: skip
_OPERATORS = set(  # words that make a number another one
    re.findall(
        r"\w+",
        "plus minus times over divided squared cubed half third quarter hundred hundreds thousand"
        " thousands million millions billion billions trillion dozen dozens not more less least most"
        " about approximately around maybe either neither except modulo mod from between through than"
        " where when with and for all any some none zero one two three four five six seven eight nine ten"
        " sin cos tan cot sec csc arcsin arccos arctan log exp max gcd lcm sqrt but the negative positive"
        " double twice triple thirds halves quarters",
    )
) - {"sec"}
_NUMBER = re.compile(
    r"[-+]?(?:[0-9.,\s+\-*/^{}()!]|\\(?:frac|sqrt|times|cdot|pi|pm)(?![a-zA-Z])|[eE][+-]?\d)+"
)
_EXPONENT = re.compile(r"([a-zA-Z$€£%°Ω]+)\s*(?:\^\s*\{?\s*([-+]?\d+)\s*\}?)?|(/)")
_TRAILING = re.compile(
    r"[\s~]*((?:[a-zA-Z$€£°Ω]|\\Omega|\\mu|\\%|%|\^\\circ|[«»]|\^\s*\{?\s*[-+]?\d+\s*\}?|\\cdot|[/.\s-])+)$"
)
_MONEY = re.compile(r"([-+]?)\s*(\\\$|[$€£¥]|\\pounds|\\euro)\s*(?=[\d.\\])")


def split_unit(answer: str) -> tuple[str, str | None]:
    r"""Return (expression, unit) of a quantity, else (answer, None). «…» marks text, as of `\text{…}`."""
    if money := _MONEY.match(answer):
        rest, more = split_unit(answer[: money.start()] + money[1] + answer[money.end() :])
        sign = {"\\$": "$", "\\pounds": "£", "\\euro": "€"}.get(money[2], money[2])
        return (rest, sign) if more in (None, sign) else (answer, None)
    start = _NUMBER.match(answer)
    is_number = start is not None and re.search(r"\d|\\pi", start[0]) is not None
    if not is_number:
        return _behind_expression(answer)
    assert start is not None
    end = start.end()
    while end > 0 and (answer[end - 1] in " +-*/^({" or answer[:end].endswith("\\")):
        end -= 1
    head, tail = answer[:end].strip(), answer[end:].strip()
    if not tail or not head or not _TRAILING.fullmatch(answer[end:]):
        return answer, None
    is_spaced = answer[end] in " «" or tail[0] in "^\\%°$€£"
    unit = unit_of(tail, is_spaced)
    return (answer, None) if unit is None else (head, unit)


def _behind_expression(answer: str) -> tuple[str, str | None]:
    """Split `x «cm»`: behind letters only text of a known unit is one."""
    marked = re.fullmatch(r"(.*[^«»\s])\s*«([^«»]*)»\s*((?:\^\s*\{?[-+]?\d+\}?)?)\s*", answer)
    if marked is None or "«" in marked[1]:
        return answer, None
    words = re.findall(r"[a-zA-Z]+", marked[2])
    if not words or not all(_known(word) for word in words):
        return answer, None
    unit = unit_of(f"«{marked[2]}»{marked[3]}", True)
    return (answer, None) if unit is None else (marked[1].strip(), unit)


def _known(word: str) -> bool:
    return word in _SYMBOLS or word.lower() in _ALIASES or word.lower().removesuffix("s") in _ALIASES


def unit_of(text: str, is_spaced: bool) -> str | None:
    """Return the unit in one spelling, or None if it is none. is_spaced: it is separate from its number."""
    is_text = "«" in text
    plain = re.sub("[«»]", " ", text).replace(r"^\circ", " ° ").replace(r"\%", "%").replace("\\cdot", " ")
    plain = plain.replace(r"\Omega", "Ω").replace(r"\mu", "u").replace("°", " ° ").strip(" .-")
    powers: dict[str, int] = {}
    sign, next_power = 1, 1
    words = _EXPONENT.findall(plain)
    if not words or len(words) > 8 or re.sub(r"[-.\s]", "", _EXPONENT.sub("", plain)):
        return None
    for word, power, slash in words:
        if slash or word == "per":
            sign = -1
            continue
        lower = word.lower()
        if lower in ("square", "sq", "cubic", "cu"):
            next_power = 2 if lower.startswith("sq") else 3
            continue
        if lower in ("squared", "cubed") and powers:
            powers[list(powers)[-1]] *= 2 if lower == "squared" else 3
            continue
        if not is_text and not _is_unit(word, is_spaced):
            return None
        if lower in _OPERATORS:
            return None
        name = _spelling(word)
        powers[name] = powers.get(name, 0) + sign * next_power * int(power or 1)
        next_power = 1
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power) or None


def _is_unit(word: str, is_spaced: bool) -> bool:
    if word in "%°$€£Ω":
        return True
    if word in _SYMBOLS:
        return is_spaced or len(word) > 1
    return len(word) >= 3 and word.lower() not in _OPERATORS


def _spelling(word: str) -> str:
    if word in _SYMBOLS and word.lower() not in _ALIASES:
        return word
    lower = word.lower() if len(word) > 2 else word
    singular = lower.removesuffix("s") if len(lower) > 3 and not lower.endswith("ss") else lower
    return _ALIASES.get(lower) or _ALIASES.get(singular) or singular
