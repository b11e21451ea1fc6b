"""Load the configuration from a YAML file and dotted overrides; errors name file, line and key."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.explain import and_above, explain, shortened
from megatron_srpo.config.schema import Config
from megatron_srpo.data.atomic import write_text

LARGEST = 100_000  # values in a file, those of an alias (*name) counted each time it is used


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
    return validate_tree(*_read_yaml(path), overrides, str(path))


def validate_tree(tree: dict[str, Any], places: dict[str, str], overrides: list[str], origin: str) -> Config:
    """Apply the overrides to a tree of keys and validate it; see `load_config`.

    Args:
        tree: Sections and keys; is changed.
        places: The place of every dotted key in the tree.
        overrides: `section.key=value`, in order.
        origin: The place of what is missing.
    """
    # A task without a file makes its questions itself: its name is no name for the questions of a file.
    task = tree.get("task")
    is_own_name = isinstance(task, dict) and task.get("path") is not None
    for override in overrides:
        key, value = _parse(override)
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"override {override!r}: {section} is not a section; expected section.key=value"
                )
        node[name] = value
        places = {known: place for known, place in places.items() if not known.startswith(f"{key}.")}
        for depth in range(1, len(sections) + 1):
            places.setdefault(".".join(sections[:depth]), f"override {override!r}")
        places[key] = f"override {override!r}"
        is_own_name |= key in ("task", "task.name")
    if isinstance(task := tree.get("task"), dict) and task.get("path") is not None and not is_own_name:
        task.pop("name", None)
    if isinstance(algorithm := tree.get("algorithm"), dict):
        algorithm.setdefault("name", Config.model_fields["algorithm"].default.name)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(one, places, origin) for one in error.errors())) from None
    _refuse_logins(tree, "", places)
    return config


def _refuse_logins(node: Any, key: str, places: dict[str, str]) -> None:
    """Raise ConfigError for a URL with a user or a password, which config.yaml would keep."""
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_logins(value, f"{key}.{name}" if key else str(name), places)
    elif isinstance(node, list):
        for value in node:
            _refuse_logins(value, key, places)
    elif isinstance(node, str) and re.search(r"://[^/\s]*@", node):
        place = next((places[known] for known in and_above(key) if known in places), "")
        expected = "expected a URL without user and password, which config.yaml would keep"
        raise ConfigError(f"{place}: {key}: {expected}; set them in the environment, not {node!r}")


def _parse(override: str) -> tuple[str, Any]:
    """Return key and value of an override; raise ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        example = "expected section.key=value, such as train.steps=100"
        raise ConfigError(f"override {shortened(override)}: {example}")
    where = f"override {shortened(override)}"
    try:
        _refuse_size(yaml.compose(text, _Loader), where)
        return SHORT.get(key, key), yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: the value is not YAML: {_yaml_problem(error)}") from None


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
                raise ConfigError(f"{place}: {key}: given twice, first at {places[key]}; remove one")
            places[key] = place
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, f"{key}.")

    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(f"{path}: cannot be read: is {kind}; expected a YAML file")
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, _Loader)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected sections (model:, train:, …) at the top level")
        _refuse_size(root, str(path))
        tree = yaml.load(text, _Loader)
        walk(root, "")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; expected a YAML file") from None
    except RecursionError:
        expected = "expected no alias (*name) that contains itself"
        raise ConfigError(f"{path}: is nested without end or too deeply to be read; {expected}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: is not valid YAML: not UTF-8; expected a UTF-8 file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else f"{path}"
        expected = "expected key: value, indented with spaces"
        raise ConfigError(f"{where}: is not valid YAML: {_yaml_problem(error)}; {expected}") from None
    return {
        key: {} if value is None and key in Config.model_fields else value for key, value in tree.items()
    }, places


def _yaml_problem(error: Exception) -> str:
    """Return a parser's error in one line, without its place."""
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.context, error.problem) if part)
    return " ".join(str(error).split())


def _refuse_size(root: yaml.Node | None, where: str) -> None:
    """Raise ConfigError for a tree that its aliases make huge (a few lines are enough for 10⁹ values)."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if root is not None and (found := size(root)) > LARGEST:
        expected = f"a configuration of at most {LARGEST:,}; write out what the aliases (*name) repeat"
        raise ConfigError(f"{where}: holds {found:,} values, expected {expected}")
