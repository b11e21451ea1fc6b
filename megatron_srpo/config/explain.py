"""One sentence for each error that pydantic finds in a configuration: found, expected, what to do."""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from megatron_srpo.algorithm import METHODS
from megatron_srpo.config.schema import Config
from megatron_srpo.config.task_section import TaskSource

_LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_pattern_mismatch": "text that matches {pattern}",
    "finite_number": "a finite number",
}
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list, [one, two]",
    "tuple": "a list, [one, two]",
    "dict": "a mapping, {key: value}",
    "is": "an instance",
}
_LONGEST = 200  # characters of a value that is shown


def explain(problem: ErrorDetails, places: dict[str, str], default_place: str) -> str:
    """Describe an error in one line: place, key, what was found, what was expected, what to do.

    Args:
        problem: One of a ValidationError's errors.
        places: The place ("file:line" or the override) of every dotted key that was given.
        default_place: The place of what was not given.
    """
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["algorithm"] and len(location) > 1:  # pydantic inserts the union's tag
        location = ["algorithm", *location[2:]]
    key = ".".join(location)
    if problem["type"] == "value_error":  # a validator of several keys names the one to change
        message = problem["msg"].removeprefix("Value error, ")
        name, _, rest = message.partition(": ")
        for named in (name, f"{key}.{name}"):
            if named in places:
                key, message = named, rest
    elif problem["type"] == "union_tag_invalid":
        key, given = "algorithm.name", str(problem.get("ctx", {})["tag"])
        message = f"unknown algorithm {given!r}; {_nearest(given, list(METHODS))}"
    else:
        message = _message(problem, location)
    place = next((places[nearest] for nearest in and_above(key) if nearest in places), default_place)
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _message(problem: ErrorDetails, location: list[str]) -> str:
    kind, found, limits = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_other_key(location, problem)}"
    if kind == "missing":
        return _required(location)
    expected = problem["msg"]
    if kind in _LIMITS:
        expected = _LIMITS[kind].format(**limits)
    elif kind == "literal_error":
        expected = _one_of(str(limits["expected"]).replace("'", ""), found)
    elif kind in ("model_type", "model_attributes_type"):
        expected = _a_section(location, found)
    elif (name := kind.partition("_")[0]) in _TYPES:
        expected = _TYPES[name]
    return f"expected {expected}, not {shortened(found)}"


def _one_of(options: str, found: Any) -> str:
    """Return the options "a, b or c", with the one that is nearest to what was found."""
    known = options.replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(found, known, n=1) if isinstance(found, str) else []
    return f"{options} (did you mean {near[0]}?)" if near else options


def shortened(value: Any) -> str:
    """Return a value as shown in a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _a_section(location: list[str], found: Any) -> str:
    """Describe a section, given a value in its place: the key that was probably meant is its first."""
    section = ".".join(location)
    if location[0] in ("task", "evaluation") and len(location) > 1:
        return "a task's name, or a mapping with its name or path"
    first = next(iter(_model_of(location).model_fields))
    value = found if isinstance(found, str | int) else "…"
    return f"a section of keys (set {section}.{first}={value})"


def _required(location: list[str]) -> str:
    """Describe a key that is missing, by its meaning; of a section, by its required keys."""
    field = _model_of(location[:-1]).model_fields.get(location[-1])
    if field is None:  # an item of a list
        return "is required"
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        fields = field.annotation.model_fields.items()
        keys = [f"{location[-1]}.{name}" for name, inner in fields if inner.is_required()]
        return f"is required; set {', '.join(keys)}"
    return f"is required: {field.description}"


def _other_key(location: list[str], problem: ErrorDetails) -> str:
    """Suggest a key for one that does not exist: of the same name elsewhere, or of a similar name."""
    *section, name = location
    key, known = ".".join(location), _known_names(section, problem)
    owners = [method for method, model in METHODS.items() if name in model.model_fields]
    if section == ["algorithm"] and owners:
        return f"only algorithm.name: {' and '.join(owners)} has it"
    if elsewhere := [other for other in keys_named(name) if other != key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(name, known, n=1)
    if not near and not section:
        names = [other.rpartition(".")[2] for other in _dotted_keys(Config)]
        if similar := difflib.get_close_matches(name, names, n=1):
            return f"did you mean {' or '.join(keys_named(similar[0]))}?"
    return _nearest(name, sorted(known))


def keys_named(name: str) -> list[str]:
    """Return the dotted names of all keys called `name`, or of the one that `name` is a dotted name of."""
    every = dict.fromkeys(_dotted_keys(Config))
    return [key for key in every if name in (key, key.rpartition(".")[2])]


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys; those of any algorithm."""
    for name, field in model.model_fields.items():
        key, annotation = f"{prefix}{name}", field.annotation
        if key == "algorithm":
            yield from (f"algorithm.{inner}" for method in METHODS.values() for inner in method.model_fields)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _dotted_keys(annotation, f"{key}.")
        else:
            yield key


def and_above(key: str) -> list[str]:
    """Return a dotted key and its sections, innermost first."""
    return [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == ".")]


def _known_names(section: list[str], problem: ErrorDetails) -> list[str]:
    """Return the keys of a section, given by the parts of its dotted name."""
    if section[:1] == ["algorithm"]:
        return list(METHODS[str(problem["loc"][1])].model_fields)
    if section[:1] in (["task"], ["evaluation"]) and len(section) > 1:  # an entry of a list of tasks
        return list(TaskSource.model_fields)
    return list(_model_of(section).model_fields)


def _model_of(section: list[str]) -> type[BaseModel]:
    """Return the class of a section, given by the parts of its dotted name."""
    model: type[BaseModel] = Config
    for name in section:
        if name == "algorithm":
            return next(iter(METHODS.values()))
        field = model.model_fields.get(name)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return model
        model = field.annotation
    return model


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
