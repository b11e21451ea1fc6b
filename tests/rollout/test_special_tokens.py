"""Test that special tokens with a meaning reach the verifier, and those that separate turns do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny import make_model, make_tokenizer

from megatron_srpo.algorithm.reprompt import clean_demonstration
from megatron_srpo.data.records import Prompt
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import Completion
from megatron_srpo.tasks import mathematics, sciknoweval

MEANINGFUL = ["<answer>", "</answer>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    """Return a collector whose tokenizer has `<answer>` and `<think>` as special tokens."""
    folder = tmp_path_factory.mktemp("special")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *MEANINGFUL]})
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = HFFolder(folder)
    found.__dict__["tokenizer"] = tokenizer  # it has more tokens than the tiny model
    return Collector(*cast(Any, (None, None, found, None, SimpleNamespace())))


def text_of(collector, said, prompt_text=""):
    tokenizer = collector.folder.tokenizer
    ids = collector.folder.tokenizer(said, add_special_tokens=False).input_ids
    completion = Completion(ids, [-1.0] * len(ids), [("0", 0, len(ids))], "stop")
    prompt = Prompt(id="p", task="t", messages=({"role": "user", "content": "Q"},), answer="B")
    prompt = prompt.model_copy(
        update={"ids": tuple(tokenizer(prompt_text, add_special_tokens=False).input_ids)}
    )
    return collector._sample(prompt, 0, completion).text


def test_answer_and_thinking_reach_the_verifier(collector):
    said = "<think>A?</think>So:<answer>B</answer>"
    text = text_of(collector, said + "<|im_end|>")
    assert text == said
    assert sciknoweval.verify("B", text).correct
    assert clean_demonstration(text) == "So:<answer>B</answer>"  # a sibling's thinking is not shown


def test_tokens_that_separate_turns_vanish(collector):
    assert text_of(collector, "<|im_start|>B<|endoftext|><|im_end|>") == "B"


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<|im_start|>assistant\n<think>\n\n"])
def test_a_box_inside_thinking_that_the_template_opened_is_no_answer(collector, opening):
    unfinished = text_of(collector, r"so \boxed{5} or", opening)
    assert not mathematics.verify("5", unfinished).correct and clean_demonstration(unfinished) == ""
    finished = text_of(collector, r"so \boxed{4}?</think>It is \boxed{5}.", opening)
    assert mathematics.verify("5", finished).correct
    assert clean_demonstration(finished) == r"It is \boxed{5}."


def test_closed_thinking_in_the_prompt_changes_nothing(collector):
    assert text_of(collector, "5", "<think>\n\n</think>\n\n") == "5"
