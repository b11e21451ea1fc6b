"""Read a Hugging Face model folder: architecture, files of the tensors, tokenizer."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.architecture import Architecture, UnsupportedModel
from megatron_srpo.model.families import architecture_of


class FolderError(FileError):
    """A Hugging Face folder is incomplete, damaged or not supported; the message names the file."""


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Convert a FolderError raised in the block to a ConfigError that begins with the configuration's key."""
    try:
        yield
    except FolderError as error:
        raise ConfigError(f"{key}: {error}") from None


class HFFolder:
    """The folder at `path`. Every method raises FolderError, which names the file and the problem."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FolderError(f"{self.path.resolve()} is not a folder; expected a Hugging Face model folder")

    def _json(self, name: str) -> dict:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            return content
        except FileNotFoundError:
            raise FolderError(f"{file} is missing; is this a Hugging Face model folder?") from None
        except (OSError, ValueError) as error:
            raise FolderError(f"{file} cannot be read: {error}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self._json("config.json")

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture that config.json describes."""
        try:
            return architecture_of(self.config)
        except UnsupportedModel as error:
            raise FolderError(f"{self.path / 'config.json'}: {error}") from None

    def validate(self) -> None:
        """Raise FolderError if config.json, a tensor's name or shape, or the tokenizer is invalid."""
        _ = self.file_of
        _ = self.tokenizer

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The safetensors file of every tensor. Checks names and shapes; reads only headers."""
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file in self._weight_files():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118  (not a dict)
                        found[key] = file, tuple(tensors.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise FolderError(f"{file} is damaged or not a safetensors file: {error}") from None
        expected = self.architecture.tensor_shapes()
        for key, shape in expected.items():
            if key not in found:
                raise FolderError(f"{self.path}: tensor {key} is missing")
            if found[key][1] != shape:
                file, wrong = found[key]
                raise FolderError(f"{file}: {key} has shape {list(wrong)}, config.json implies {list(shape)}")
        tied = [mapping for mapping in self.architecture.mappings if mapping.tied_to is not None]
        copies = {name for mapping in tied for name in mapping.tensors}
        if unexpected := sorted(set(found) - set(expected) - copies):
            file, _ = found[unexpected[0]]
            raise FolderError(f"{file}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all)")
        return {key: found[key][0] for key in expected}

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        names, listed = ["model.safetensors"], ""
        if index.exists():
            weight_map = self._json(index.name).get("weight_map", {})
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise FolderError(f"{index}: weight_map is not an object of tensor names and file names")
            names, listed = sorted(set(weight_map.values())), f" ({index.name} lists it)"
        files = [self.path / name for name in names]
        for file in files:
            if not file.is_file():
                raise FolderError(f"{file} is missing{listed}")
        return files

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; has a chat template, and no more tokens than the embedding has rows."""
        from transformers import AutoTokenizer

        if not (self.path / "tokenizer.json").is_file() and not (self.path / "vocab.json").is_file():
            raise FolderError(f"{self.path}: tokenizer.json is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # the libraries raise many kinds of errors for a damaged file
            raise FolderError(f"{self.path}: the tokenizer cannot be loaded: {error}") from None
        size, rows = len(tokenizer), self.architecture.vocab_size
        if size > rows:
            raise FolderError(f"{self.path}: the tokenizer has {size} tokens but the embedding only {rows}")
        if tokenizer.chat_template is None:
            raise FolderError(f"{self.path}: the tokenizer has no chat template")
        if tokenizer.eos_token_id is None:
            raise FolderError(f"{self.path}: the tokenizer has no end-of-sequence token")
        return tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the eos_token_id of the tokenizer and of generation_config.json."""
        ids = {self.tokenizer.eos_token_id}
        if (self.path / "generation_config.json").exists():
            given = self._json("generation_config.json").get("eos_token_id")
            ids |= set(given if isinstance(given, list) else [given]) - {None}
        return tuple(sorted(ids))

    @cached_property
    def _turn_ids(self) -> frozenset[int]:
        """The special ids that separate turns: the chat template's, those that end a response, padding."""
        tokenizer = self.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        written = tokenizer(text, add_special_tokens=False).input_ids
        added = tokenizer.added_tokens_decoder
        special = {token for token in written if token in added and added[token].special}
        return frozenset({*special, *self.stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id})

    def decode(self, ids: Sequence[int]) -> str:
        """Return a response's text without the tokens that separate turns.

        Other special tokens stay: in some tokenizers `<answer>` and `<think>` are such tokens.
        """
        kept = [token for token in ids if token not in self._turn_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def encode(self, messages: list[dict[str, str]], enable_thinking: bool = False) -> list[int]:
        """Return the token ids of chat messages, with the assistant's generation header."""
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": enable_thinking}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            raise FolderError(f"{self.path}: the chat template cannot be applied: {error}") from None
        return self.tokenizer(text, add_special_tokens=False).input_ids
