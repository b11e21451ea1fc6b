"""Read a Hugging Face model folder: architecture, files of the tensors, tokenizer."""

import datetime
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.processes import rank_from_environment
from megatron_srpo.model.architecture import Architecture, UnsupportedModel
from megatron_srpo.model.families import architecture_of
from megatron_srpo.model.folder_files import FolderError, check_texts, read_json, weight_files
from megatron_srpo.model.reference import check_config, check_copy, check_tokens, check_turn_end

FLOATS = ("F32", "BF16", "F16")  # dtypes of weights, by safetensors' names

# The date in prompts of chat templates that ask for today's; Llama's templates use it if they have no clock.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
_PROMPT_TAIL = 16  # tokens that hold a `<think>` and the white space after it
_CLOCK_USE = re.compile(r"\bstrftime_now\s*\(")
_CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(["'])([^"']*)\1\s*\)""")


class _Header(NamedTuple):
    """Location, shape and dtype of a stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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
            expected = "expected a Hugging Face model folder"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(self.path)) and not self.path.exists():
                expected += f"; to get a model of the Hub: hf download {self.path} --local-dir DIR"
            raise FolderError(f"{self.path.resolve()} is not a folder; {expected}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / "config.json")

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture that config.json describes."""
        try:
            return architecture_of(self.config)
        except UnsupportedModel as error:
            raise FolderError(f"{self.path / 'config.json'}: {error}") from None

    def validate(self) -> None:
        """Raise FolderError if config.json, a tensor's name, shape or dtype, or the tokenizer is invalid.

        The first rank also compares what is read here with what transformers reads.
        """
        _ = self.file_of
        if is_first := rank_from_environment() == 0:
            self.check_weights()
        _ = self.stop_ids
        if is_first:
            check_tokens(self.path, self.tokenizer)
            check_turn_end(self.path, self.tokenizer, self.stop_ids)

    def check_weights(self) -> None:
        """Raise FolderError if transformers reads another architecture, or another output matrix."""
        check_config(self.path, self.architecture)
        file_of = {name: header.file for name, header in self._headers.items()}
        for mapping in self.architecture.mappings:
            for copy in mapping.tensors if mapping.tied_to is not None else ():
                if copy in file_of and mapping.tied_to is not None:
                    check_copy(file_of, copy, mapping.tied_to)

    @cached_property
    def _headers(self) -> dict[str, _Header]:
        found: dict[str, _Header] = {}
        for file in weight_files(self.path):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118  (not a dict)
                        if key in found:
                            raise FolderError(f"{file}: {key} is in {found[key].file.name}, too")
                        part = tensors.get_slice(key)
                        found[key] = _Header(file, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise FolderError(f"{file} is damaged or not a safetensors file: {error}") from None
        return found

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The safetensors file of every tensor. Checks names, shapes and dtypes; reads only headers."""
        expected, found = self.architecture.tensor_shapes(), self._headers
        for key, shape in expected.items():
            if key not in found:
                raise FolderError(f"{self.path}: tensor {key} is missing")
            file, given, dtype = found[key]
            if given != shape:
                raise FolderError(f"{file}: {key} has shape {list(given)}, config.json implies {list(shape)}")
            if dtype not in FLOATS:
                wanted = "expected one of F32, BF16 and F16 (quantised models cannot be read)"
                raise FolderError(f"{file}: {key} has dtype {dtype}; {wanted}")
        tied = [mapping for mapping in self.architecture.mappings if mapping.tied_to is not None]
        copies = {name for mapping in tied for name in mapping.tensors}
        if unexpected := sorted(set(found) - set(expected) - copies):
            file = found[unexpected[0]].file
            raise FolderError(f"{file}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all)")
        return {key: found[key].file for key in expected}

    def dtype_of(self, name: str) -> str:
        """Return a tensor's stored dtype, by safetensors' name."""
        return self._headers[name].dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; has a chat template, and no more tokens than the embedding has rows."""
        from transformers import AutoTokenizer

        if not (self.path / "tokenizer.json").is_file() and not (self.path / "vocab.json").is_file():
            raise FolderError(f"{self.path}: tokenizer.json is missing")
        check_texts(self.path)
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            tokenizer: Any = AutoTokenizer.from_pretrained(self.path, **options)
        except Exception as error:  # the libraries raise many kinds of errors for a damaged file
            raise FolderError(f"{self.path}: the tokenizer cannot be loaded: {error}") from None
        size, rows = len(tokenizer), self.architecture.vocab_size
        if size > rows:
            raise FolderError(f"{self.path}: the tokenizer has {size} tokens but the embedding only {rows}")
        if tokenizer.chat_template is None:
            raise FolderError(f"{self.path}: the tokenizer has no chat template")
        if isinstance(templates := tokenizer.chat_template, dict) and "default" not in templates:
            names = ", ".join(map(repr, templates))
            raise FolderError(f"{self.path}: has chat templates {names}, but none named 'default'")
        if tokenizer.eos_token_id is None:
            raise FolderError(f"{self.path}: the tokenizer has no end-of-sequence token")
        tokenizer.clean_up_tokenization_spaces = False  # decoding would drop spaces before punctuation
        return tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: eos_token_id of the tokenizer, and of generation_config.json.

        As in transformers, config.json's is used where generation_config.json has none.
        """
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            file = self.path / name
            given = read_json(file).get("eos_token_id") if file.exists() else None
            for token in given if isinstance(given, list) else [] if given is None else [given]:
                if type(token) is not int or not 0 <= token < self.architecture.vocab_size:
                    wanted = f"expected token ids below {self.architecture.vocab_size}"
                    raise FolderError(f"{file}: eos_token_id is {given!r}, {wanted}")
                ids.add(token)
            if given is not None:
                break
        return tuple(sorted({*ids, self.tokenizer.eos_token_id}))

    @cached_property
    def _dated_template(self) -> str | None:
        """The chat template with a fixed date in place of today's; None if it has none."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str) or not _CLOCK_USE.search(template):
            return None
        dated = _CLOCK.sub(lambda match: repr(TEMPLATE_DATE.strftime(match[2])), template)
        if _CLOCK_USE.search(dated):
            problem = "asks for today's date (strftime_now) in a format that is no literal; write the date"
            raise FolderError(f"{self.path}: the chat template {problem} into the template")
        return dated

    @cached_property
    def _turn_ids(self) -> frozenset[int]:
        """The special ids that separate turns: the chat template's, those that end a response, padding."""
        tokenizer = self.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        written = tokenizer(text, add_special_tokens=False).input_ids
        added = tokenizer.added_tokens_decoder
        special = {token for token in written if token in added and added[token].special}
        return frozenset({*special, *self.stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id})

    def decode(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """Return a response's text without the tokens that separate turns.

        Other special tokens stay: in some tokenizers `<answer>` and `<think>` are such tokens. If the chat
        template ends the prompt with `<think>`, the text begins with it, so that unfinished thinking is seen.
        """
        kept = [token for token in ids if token not in self._turn_ids]
        text = self.tokenizer.decode(kept, skip_special_tokens=False)
        prompt = self.tokenizer.decode(list(prompt_ids[-_PROMPT_TAIL:]), skip_special_tokens=False)
        return f"<think>{text}" if prompt.rstrip().endswith("<think>") else text

    def encode(self, messages: list[dict[str, str]], enable_thinking: bool = False) -> list[int]:
        """Return the token ids of chat messages, with the assistant's generation header."""
        tokenizer = self.tokenizer
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": True,
            "enable_thinking": enable_thinking,
        }
        if self._dated_template is not None:
            options["chat_template"] = self._dated_template
        try:
            text = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template may divide by zero, add text to a number, …
            problem = f"{type(error).__name__}: {error}"
            raise FolderError(f"{self.path}: the chat template cannot be applied: {problem}") from None
        return tokenizer(text, add_special_tokens=False).input_ids
