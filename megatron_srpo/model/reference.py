"""Compare a model folder with what transformers reads from it, and refuse differences by name.

Configuration, weights and stop tokens are read by our own code, and some versions of transformers change the
ids of a foreign tokenizer.json. A difference would train on wrong values without an error.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_srpo.model.architecture import Architecture, UnsupportedModel
from megatron_srpo.model.families import architecture_of
from megatron_srpo.model.folder_files import FolderError

# Digits, contractions, spaces, line ends, code, other scripts, symbols; all of it in NFC, to which some
# classes of transformers convert the text.
TEXTS = (
    "Compute 347 + 58612 = ?  The answer is 3.14159,  or 2e-7; isn't it? WE'LL SEE: don't.",
    "  leading, trailing, double  and triple   spaces \t\ttabs\n\nnewlines\r\n \n  x = f(a[0], **b)  # y\n",
    "Größe naïve Ünï №½ ﬁ İstanbul ΑΒγ привет שלום مرحبا नमस्ते 你好，世界 こんにちは 한국어",
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n```python\nreturn not x_1 != ~y>>2\n```',
    "\\boxed{\\frac{1}{2}} \\le ∞ ≠ √2 → 90° 😀👩‍🔬\u00a0\u200b . , ! ? 's n't ( [ </answer>",
)
_ANSWER = "Q7"
_ROWS = 4096  # compared at once


def check_config(folder: Path, architecture: Architecture) -> None:
    """Raise FolderError if transformers reads another architecture from config.json."""
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        theirs = architecture_of(config.to_dict())
    except UnsupportedModel as error:
        raise FolderError(f"{file}: as transformers reads it, {error}") from None
    except Exception as error:  # its checks raise many kinds of errors
        raise FolderError(f"{file}: transformers cannot read it: {_one_line(error)}") from None
    for field in dataclasses.fields(architecture):
        own, other = getattr(architecture, field.name), getattr(theirs, field.name)
        if own != other:
            raise FolderError(f"{file}: {field.name} is {other!r} for transformers, but {own!r} here")
    if (folder / "adapter_config.json").exists():
        hint = "merge the adapter into the weights and remove the file"
        raise FolderError(f"{folder / 'adapter_config.json'}: adapters are not supported; {hint}")


def check_copy(file_of: dict[str, Path], copy: str, original: str) -> None:
    """Raise FolderError if the stored tensor `copy` differs from `original`, to which config.json ties it."""
    with safe_open(file_of[copy], "pt") as first, safe_open(file_of[original], "pt") as second:
        one, other = first.get_slice(copy), second.get_slice(original)
        equal = one.get_shape() == other.get_shape()
        for start in range(0, one.get_shape()[0] if equal else 0, _ROWS):
            rows = slice(start, start + _ROWS)
            equal = equal and torch.equal(one[rows].float(), other[rows].float())
    if not equal:
        problem = f"{copy} differs from {original}, but config.json has tie_word_embeddings: true"
        hint = f"set it to false, as transformers then uses both, or remove {copy}"
        raise FolderError(f"{file_of[copy]}: {problem}; {hint}")


def check_tokens(folder: Path, tokenizer: Any) -> None:
    """Raise FolderError if AutoTokenizer encodes or decodes otherwise than the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    try:
        stored = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise FolderError(f"{file} cannot be read: {_one_line(error)}") from None
    stored.no_truncation()
    stored.no_padding()
    specials = [token.content for token in stored.get_added_tokens_decoder().values()]
    named = dict.fromkeys([*specials, *tokenizer.all_special_tokens])
    chat = _chat(tokenizer) or ""
    hint = f"is tokenizer_class in tokenizer_config.json right? It was loaded as {type(tokenizer).__name__}"
    for text in (*TEXTS, chat, *(f"a {token} b{token}\n" for token in named)):
        try:
            fault = _difference(stored, tokenizer, text)
        except Exception as error:  # tokenizers raises nothing more special
            fault = f"cannot be encoded: {_one_line(error)}"
        if fault is not None:
            raise FolderError(f"{folder}: the text {text!r} {fault}; {hint}")


def _difference(stored: Any, tokenizer: Any, text: str) -> str | None:
    """Return how tokenizer.json and AutoTokenizer differ in encoding `text` or decoding its ids."""
    ids = stored.encode(text, add_special_tokens=False).ids
    found = list(tokenizer(text, add_special_tokens=False).input_ids)
    pairs = zip([*ids, None], [*found, None], strict=False)
    place = next((place for place, (own, other) in enumerate(pairs) if own != other), None)
    if place is not None:
        both = f"{ids[place : place + 4]}… by tokenizer.json, {found[place : place + 4]}…"
        return f"has ids {both} by transformers' AutoTokenizer, from position {place} on"
    own, other = stored.decode(ids, skip_special_tokens=False), tokenizer.decode(ids)
    if own != other:
        return f"is decoded as {own!r} by tokenizer.json, as {other!r} by transformers' AutoTokenizer"
    if text.split() != own.split() and "".join(text.split()) == "".join(own.split()):
        return f"is decoded as {own!r}, with other white space"
    return None


def check_turn_end(folder: Path, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
    """Raise FolderError if the chat template ends an answer with a token that does not end a response."""
    before, answer, rest = (_chat(tokenizer) or "").rpartition(_ANSWER)
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(rest, add_special_tokens=False).input_ids if answer else []
    end = next((token for token in ids if token in added), None)
    if end is not None and end not in stop_ids:
        problem = f"the chat template ends an answer with {str(added[end])!r} ({end}), but stop tokens are"
        hint = "add it to eos_token_id in generation_config.json"
        raise FolderError(f"{folder}: {problem} {', '.join(map(str, stop_ids))}; {hint}")


def _chat(tokenizer: Any) -> str | None:
    """Return a conversation by the chat template, or None if it takes no answers."""
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": _ANSWER}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    except Exception:  # a template may raise anything; `HFFolder.encode` names what its prompts raise
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
