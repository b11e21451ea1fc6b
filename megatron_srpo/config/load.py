"""The configuration from a YAML file and dotted overrides; what is wrong with it by file, line and key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from megatron_srpo.algorithm import METHODS
from megatron_srpo.config.schema import Config, ConfigError, TaskSource


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as text; everybody means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


SHORT = {
    "hf_path": "model.hf_path",
    "checkpoint": "evaluation.checkpoint",
}  # what overrides may call by its last name


def load_config(path: Path, overrides: list[str]) -> Config:
    """The configuration in YAML file `path` with `section.key=value` overrides applied (values are YAML too).

    Raises ConfigError naming every wrong key with its file and line (or the override), and the nearest valid
    name.
    """
    tree, places = _read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r}: expected section.key=value")
        key = SHORT.get(key, key)
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {section} is not a section")
        node[name] = value
        places = {known: place for known, place in places.items() if not known.startswith(f"{key}.")}
        for depth in range(1, len(sections) + 1):
            places.setdefault(".".join(sections[:depth]), f"override {override!r}")
        places[key] = f"override {override!r}"
    if isinstance(algorithm := tree.get("algorithm"), dict):
        algorithm.setdefault("name", Config.model_fields["algorithm"].default.name)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, path, places) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the configuration as run, every default spelled out."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """The file's tree and the place ("file:line") of every dotted key.

    Raises ConfigError for bad YAML or repeated keys.
    """
    places: dict[str, str] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            key, place = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
            if key in places:
                raise ConfigError(f"{place}: {key}: given twice, first at {places[key]}")
            places[key] = place
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, f"{key}.")

    try:
        text = path.read_text(encoding="utf-8")
        root, tree = yaml.compose(text, _Loader), yaml.load(text, _Loader)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected sections (model:, train:, …) at the top level")
        walk(root, "")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: is nested without end: an alias (*name) stands inside what it names"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    return {
        key: {} if value is None and key in Config.model_fields else value for key, value in tree.items()
    }, places


def _explain(problem: dict, path: Path, places: dict[str, str]) -> str:
    """One line for one pydantic error: place, key, what is wrong, nearest valid name."""
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["algorithm"] and len(location) > 1:  # pydantic inserts the union's tag
        location = ["algorithm", *location[2:]]
    key = ".".join(location)
    message = problem["msg"].removeprefix("Value error, ")
    name, _, rest = message.partition(": ")
    for named in (
        name,
        f"{key}.{name}",
    ):  # a check over several keys names the one to change, in its section or whole
        if named in places:
            key, message = named, rest
    place = next((places[nearest] for nearest in _and_above(key) if nearest in places), str(path))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known := _known_names(location[:-1], problem), n=1)
        message = "unknown key; " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        )
    elif problem["type"] == "missing":
        message = "is required"
    elif problem["type"] == "union_tag_invalid":
        key, known = "algorithm.name", list(METHODS)
        given = str(problem["ctx"]["tag"])
        near = difflib.get_close_matches(given, known, n=1)
        message = f"unknown algorithm {given!r}; " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        )
        place = places.get(key, place)
    elif problem["type"] != "value_error":
        message = f"{message}, not {problem['input']!r}"
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _and_above(key: str) -> list[str]:
    """A dotted key and the sections it is in, the innermost first."""
    return [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == ".")]


def _known_names(section: list[str], problem: dict) -> list[str]:
    if not section:
        return list(Config.model_fields)
    if section[0] == "algorithm":
        return list(METHODS[str(problem["loc"][1])].model_fields)
    if (
        section[0] in ("task", "evaluation") and len(section) > 1
    ):  # an entry of task.mixture or evaluation.tasks
        return list(TaskSource.model_fields)
    model = Config
    for name in section:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
