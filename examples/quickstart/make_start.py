"""Make the quick start's model: a 369,504-parameter Qwen3 that adds three-digit numbers.

It is right about half of the time.

Its tokenizer is trained here too. The supervised warm-up shows two ways to answer: with the carries written
out, which such a model learns, and at once, by guessing, which is hardly ever right. So a group of samples
mostly holds right and wrong ones. Some rows show a solution before the answer, in the re-prompt form of
`megatron_srpo.algorithm.reprompt`: a model that cannot use a solution it is shown would be no teacher. The
folder is written at the end of the warm-up, read back and measured.

    python examples/quickstart/make_start.py --output start     # about three minutes on one core
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_srpo.algorithm.reprompt import clean_demonstration, teacher_messages
from megatron_srpo.data.records import Prompt
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.tasks.addition import DIGITS, Addition, verify

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = """\
{%- for message in messages %}{{ \
'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
# Qwen's: words with the sign before them, one token per digit, runs of punctuation, line ends, other spaces
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 384  # at most; the model's embedding has this many rows

STEPS, BATCH = 550, 64
STEPS_SHARE = 0.55  # rows answered with written steps
SHOWN_SHARE = 0.4  # rows whose prompt shows a solution
LEARNING_RATE, LEARNING_RATE_FLOOR, LEARNING_RATE_WARMUP = 2e-3, 0.05, 50
FIRST_SUM = 1_000_000  # runs count their prompts from 0: with the same seed they still draw sums of their own

TEST_PROMPTS, GROUP, MAX_RESPONSE = 256, 8, 64
SAMPLING_BATCH = 512


class Row(NamedTuple):
    """Hold one supervised row; the loss is on `answer`, which ends in the end-of-turn token."""

    prompt: list[int]
    answer: list[int]


def answer_directly(total: int) -> str:
    """Return the sum and nothing else."""
    return f"<answer>{total}</answer>"


def answer_in_steps(a: int, b: int) -> str:
    """Return the columns from the right, each `digit+digit+carry=carry digit`, then the sum."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return f"Steps: {' '.join(columns)}\n{answer_directly(a + b)}"


def operands(prompt: Prompt) -> tuple[int, int]:
    """Return the two numbers of the prompt's question."""
    a, b = re.findall(rf"\d{{{DIGITS}}}", prompt.messages[0]["content"])
    return int(a), int(b)


def make_tokenizer(task: Addition) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's pre-tokenization.

    Training stops when every word of the task is one token.
    """
    corpus = ["system\nuser\nassistant\n"]
    for index in range(FIRST_SUM, FIRST_SUM + 300):
        prompt = task.prompt("train", index)
        a, b = operands(prompt)
        for solution in (answer_in_steps(a, b), answer_directly(a + b)):
            corpus += [solution, teacher_messages(prompt.messages, solution)[-1]["content"]]
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = [PAD, START, END], pre_tokenizers.ByteLevel.alphabet()
    options = {
        "vocab_size": VOCABULARY,
        "special_tokens": special,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, padding_side="left"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return the untrained model, fp32, from torch's current seed."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of chat messages with the assistant's header.

    There is no folder yet to read them from.
    """
    return tokenizer(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ).input_ids


def batches(task: Addition, tokenizer: PreTrainedTokenizerFast, count: int) -> Iterator[list[Row]]:
    """Yield `count` batches of rows.

    A solution that is shown is the expected answer itself, so it has the answer's style.
    """
    rng = random.Random(task.seed)
    for start in range(FIRST_SUM, FIRST_SUM + count * BATCH, BATCH):
        rows = []
        for index in range(start, start + BATCH):
            prompt = task.prompt("train", index)
            a, b = operands(prompt)
            shown = rng.random() < SHOWN_SHARE
            if rng.random() < STEPS_SHARE:
                answer = answer_in_steps(a, b)
            elif shown:
                answer = answer_directly(a + b)
            else:  # a guess: so many hundreds, and something
                answer = answer_directly((a + b) // 100 * 100 + rng.randrange(100))
            messages = teacher_messages(prompt.messages, answer) if shown else prompt.messages
            rows.append(
                Row(encode(tokenizer, messages), tokenizer(answer).input_ids + [tokenizer.eos_token_id])
            )
        yield rows


def summed_loss(model: Qwen3ForCausalLM, rows: Sequence[Row]) -> Tensor:
    """Return the cross-entropy summed over the answers' tokens.

    Padded on the right, where causal attention never looks.
    """
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    wanted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[place, :end] = torch.tensor(prompt + answer)
        wanted[place, len(prompt) : end] = True
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = wanted[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted], reduction="sum")


def warm_up(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Addition, steps: int) -> None:
    """Train in place with supervision: AdamW, a linear rise of the learning rate and a linear fall."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    began = time.perf_counter()
    model.train()
    for step, rows in enumerate(batches(task, tokenizer, steps), start=1):
        fall = 1 - (1 - LEARNING_RATE_FLOOR) * step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / LEARNING_RATE_WARMUP) * fall
        tokens, total = sum(len(row.answer) for row in rows), 0.0
        rows.sort(key=lambda row: len(row.prompt))
        for some in (rows[: BATCH // 2], rows[BATCH // 2 :]):  # short and long prompts apart: less padding
            loss = summed_loss(model, some) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step:4d}/{steps}  loss {total:.4f}  {time.perf_counter() - began:5.0f} s", flush=True
            )


@torch.inference_mode()
def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Return one response to each prompt at temperature 1, its end-of-turn token included."""
    responses = []
    for start in range(0, len(prompts), SAMPLING_BATCH):
        batch = tokenizer.pad(
            {"input_ids": list(prompts[start : start + SAMPLING_BATCH])}, return_tensors="pt"
        )
        ids = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_RESPONSE
        )
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
    return responses


def mean(values: Sequence[float]) -> float:
    """Return the mean, nan of nothing."""
    return sum(values) / len(values) if values else float("nan")


def measure(path: Path, task: Addition) -> None:
    """Print the pass rate on test prompts, and the gain from a right sibling's solution.

    A run starts from these numbers.
    """
    folder = HFFolder(path)
    tokenizer = folder.tokenizer
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [task.prompt("test", index) for index in range(TEST_PROMPTS) for _ in range(GROUP)]
    asked = [folder.encode(list(prompt.messages)) for prompt in prompts]

    def attempt(
        chosen: Sequence[int], ids: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[str], list[bool]]:
        responses = sample(model, tokenizer, ids)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        return (
            responses,
            texts,
            [verify(prompts[n].answer, text).correct for n, text in zip(chosen, texts, strict=True)],
        )

    responses, texts, right = attempt(range(len(prompts)), asked)
    in_steps = [right[n] for n, text in enumerate(texts) if text.startswith("Steps")]
    direct = [right[n] for n, text in enumerate(texts) if not text.startswith("Steps")]
    print(
        f"pass rate {mean(right):.3f} of {len(right)} samples at temperature 1, {TEST_PROMPTS} test prompts"
    )
    print(f"  in steps {mean(in_steps):.3f} of {len(in_steps)}, direct {mean(direct):.3f} of {len(direct)}")

    rng = random.Random(task.seed)
    failed, taught = [], []
    for start in range(0, len(prompts), GROUP):
        siblings = [n for n in range(start, start + GROUP) if right[n]]
        for n in range(start, start + GROUP):
            if siblings and not right[n]:
                failed.append(n)
                demonstration = clean_demonstration(texts[rng.choice(siblings)])
                taught.append(folder.encode(teacher_messages(prompts[n].messages, demonstration)))
    mixed = len({n // GROUP for n in failed})
    print(f"  {mixed} of {TEST_PROMPTS} groups of {GROUP} are mixed")
    print(f"  {len(failed)} failed samples have a right sibling")
    if failed:
        alone, shown = mean(attempt(failed, [asked[n] for n in failed])[2]), mean(attempt(failed, taught)[2])
        print(f"  those sampled again: {alone:.3f} right alone, {shown:.3f} with the sibling's solution")
    lengths = {"prompt": asked, "teacher's prompt": taught, "response": responses}
    print(
        "  longest in tokens: "
        + ", ".join(f"{name} {max(map(len, ids), default=0)}" for name, ids in lengths.items())
    )


def main() -> None:
    """Make the folder, then measure it."""
    parser = argparse.ArgumentParser(description="Make the quick start's starting checkpoint.")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("start"), help="a new or empty folder"
    )
    parser.add_argument("--seed", type=int, default=1, help="decides the weights, the sums and the samples")
    parser.add_argument("--steps", type=int, default=STEPS, help="supervised steps")
    options = parser.parse_args()
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output: {options.output.resolve()} is not an empty folder; name another")
    if options.steps < 1:
        parser.error(f"--steps: must be at least 1, not {options.steps}")

    torch.set_num_threads(1)  # more would add numbers in another order and give other weights
    torch.manual_seed(options.seed)
    task = Addition(options.seed)
    tokenizer = make_tokenizer(task)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    warm_up(model, tokenizer, task, options.steps)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    settings = (
        options.output / "tokenizer_config.json"
    )  # a class name that transformers 4 and the engines built on it know
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    print(f"wrote {options.output}", flush=True)
    measure(options.output, task)


if __name__ == "__main__":
    main()
