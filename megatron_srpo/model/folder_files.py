"""Find and read the files of a Hugging Face model folder, which may come from anywhere.

Only regular files are opened, and text must be UTF-8 without a byte order mark. Configuration files are never
read through a link that leaves the folder: a run copies them to `hf/`, which people upload.
"""

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_srpo.distributed.files import FileError

# Files beside the weights that transformers reads, and the licence; a folder's other files are never copied.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
_TEMPLATES = "additional_chat_templates"  # a folder of named chat templates
_MAX_BYTES = 2**28  # of a JSON or text file; the largest tokenizers have 40 MB
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class FolderError(FileError):
    """A Hugging Face folder is incomplete, damaged or not supported; the message names the file."""


def read_text(file: Path) -> str:
    """Read a text file of a model folder. Raises FolderError if it is no regular file of UTF-8."""
    try:
        if not file.is_file():
            if not os.path.lexists(file):
                raise FolderError(f"{file} is missing; is this a Hugging Face model folder?")
            raise FolderError(f"{file} cannot be read: it is not a regular file")
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise FolderError(f"{file} cannot be read: it has {size} bytes, expected at most {_MAX_BYTES}")
        data = file.read_bytes()
        if data.startswith(codecs.BOM_UTF8):
            problem = "it begins with a byte order mark"
            raise FolderError(f"{file} cannot be read: {problem}; save it as UTF-8 without one")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8; save the file as UTF-8"
        raise FolderError(f"{file} cannot be read: {fault}") from None
    except OSError as error:
        raise FolderError(f"{file} cannot be read: {error.strerror}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises FolderError."""
    try:
        content = json.loads(read_text(file))
    except FolderError:
        raise
    except RecursionError:
        raise FolderError(f"{file} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise FolderError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise FolderError(f"{file} cannot be read: expected a JSON object")
    return content


def companions(folder: Path) -> dict[str, Path]:
    """Return the files beside the weights, by name, with links resolved.

    Raises:
        FolderError: If one is no regular file, or a link that leaves the folder. Links of a snapshot in
            Hugging Face's cache to `../../blobs` are followed.
    """
    home = folder.resolve()
    roots = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    templates = folder / _TEMPLATES
    listed = sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    found: dict[str, Path] = {}
    for name in (*COMPANIONS, *(f"{_TEMPLATES}/{file.name}" for file in listed)):
        if not os.path.lexists(file := folder / name):
            continue
        target = Path(os.path.realpath(file))
        if not any(target.is_relative_to(root) for root in roots):
            raise FolderError(f"{file}: is a link to {target}, outside of the folder; copy that file here")
        if not target.is_file():
            raise FolderError(f"{file}: is not a regular file")
        found[name] = target
    return found


def check_texts(folder: Path) -> None:
    """Raise FolderError if a configuration or tokenizer file is not what `read_text` or `read_json` reads."""
    for name in companions(folder):
        if name.endswith("_config.json") or name in ("config.json", "special_tokens_map.json"):
            read_json(folder / name)
        elif name.endswith((".json", ".jinja", ".txt")):
            read_text(folder / name)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads.

    Raises:
        FolderError: If one is missing, or the folder holds files of a second set of weights: transformers
            prefers model.safetensors, servers the files in the index, and neither knows which are newer.
    """
    index, names, listed = folder / _INDEX, {_WHOLE}, ""
    present = {file.name for file in folder.iterdir() if file.name == _WHOLE or _SHARD.fullmatch(file.name)}
    if index.exists():
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise FolderError(f"{index}: weight_map is not an object of tensor names and file names")
        indexed = set(weight_map.values())
        if outside := [name for name in indexed if Path(name).name != name]:
            raise FolderError(f"{index}: weight_map names {outside[0]!r}, expected a file of this folder")
        if _WHOLE not in present or indexed & present:  # else the index is left from an earlier save
            names, listed = indexed, f" ({_INDEX} lists it)"
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FolderError(f"{file} is missing{listed}")
    if others := sorted(present - names):
        hint = "delete the older ones, or read the newer ones from a folder of their own"
        raise FolderError(f"{folder}: holds two sets of weights, {files[0].name} and {others[0]}; {hint}")
    return files
