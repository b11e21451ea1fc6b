"""Load the configuration from a YAML file and dotted overrides; errors name file, line and key."""

import difflib
import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_srpo.algorithm import METHODS
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.data.atomic import write_text


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-6 as a number; YAML 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# Keys that overrides may shorten to their last name.
SHORT = {"hf_path": "model.hf_path", "checkpoint": "evaluation.checkpoint"}


def load_config(path: Path, overrides: list[str]) -> Config:
    """Load YAML file `path` and apply `section.key=value` overrides, whose values are YAML as well.

    Raises:
        ConfigError: If any key is invalid. Names each with its file and line (or override) and the nearest
            valid name.
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
    """Write the configuration as run, with every default."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """Return the file's tree and the place ("file:line") of every dotted key.

    Raises:
        ConfigError: If the file is not valid YAML or repeats a key.
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
        raise ConfigError(f"{path}: is nested without end: an alias (*name) contains itself") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    return {
        key: {} if value is None and key in Config.model_fields else value for key, value in tree.items()
    }, places


def _explain(problem: ErrorDetails, path: Path, places: dict[str, str]) -> str:
    """Describe a pydantic error in one line: place, key, what is wrong, nearest valid name."""
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["algorithm"] and len(location) > 1:  # pydantic inserts the union's tag
        location = ["algorithm", *location[2:]]
    key = ".".join(location)
    message = problem["msg"].removeprefix("Value error, ")
    name, _, rest = message.partition(": ")
    for named in (name, f"{key}.{name}"):  # a validator of several keys names the one to change
        if named in places:
            key, message = named, rest
    place = next((places[nearest] for nearest in _and_above(key) if nearest in places), str(path))
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_names(location[:-1], problem))
        message = f"unknown key; {_nearest(location[-1], known)}"
    elif problem["type"] == "missing":
        message = "is required"
    elif problem["type"] == "union_tag_invalid":
        key, given = "algorithm.name", str(problem.get("ctx", {})["tag"])
        message = f"unknown algorithm {given!r}; {_nearest(given, list(METHODS))}"
        place = places.get(key, place)
    elif problem["type"] != "value_error":
        message = f"{message}, not {problem['input']!r}"
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _and_above(key: str) -> list[str]:
    """Return a dotted key and its sections, innermost first."""
    return [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == ".")]


def _known_names(section: list[str], problem: ErrorDetails) -> list[str]:
    """Return the keys of a section, given by the parts of its dotted name."""
    if section[:1] == ["algorithm"]:
        return list(METHODS[str(problem["loc"][1])].model_fields)
    if section[:1] in (["task"], ["evaluation"]) and len(section) > 1:  # an entry of a list of tasks
        return list(TaskSource.model_fields)
    model: type[BaseModel] = Config
    for name in section:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
