"""Show a sample in the terminal: prompt, verdict, route, what its teacher saw, and its tokens."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import SampleKey
from megatron_srpo.data.rollout_file import policy_tokens
from megatron_srpo.data.visible import visible as visible
from megatron_srpo.observe.run_folder import RunFolder
from megatron_srpo.observe.tokens import NUMBERS, read_tokens


def inspect(path: Path, step: int, number: int | None, console: Console) -> None:
    """Show sample `number` (from 0) of a step, or list all if it is None. Raises ConfigError."""
    run = RunFolder.read(path)
    if number is None:
        _list(run.samples(step), {key for key, _ in read_tokens(path, step)}, console)
    else:
        _show(run, step, number, console)
    for problem in run.problems:
        console.print(Text(visible(problem), style="yellow"))


def _show(run: RunFolder, step: int, number: int, console: Console) -> None:
    """Show sample `number` of a step; of the others, only the texts are kept in memory."""
    row: dict[str, Any] | None = None
    places: dict[SampleKey, tuple[int, str]] = {}
    for place, other in enumerate(run.samples(step)):
        places[other["prompt"]["id"], other["index"]] = place, other["text"]
        row = other if place == number else row
    if row is None:
        raise ConfigError(f"--sample {number}: step {step} has the samples 0 to {len(places) - 1}")
    _facts(row, step, number, console)
    messages = [f"{message['role']}: {message['content']}" for message in row["prompt"]["messages"]]
    _section("prompt", "\n".join(messages), console)
    key = row["prompt"]["id"], row["index"]
    found = next((values for of_sample, values in read_tokens(run.path, step) if of_sample == key), None)
    if found is None:
        _section("response", row["text"], console)
    else:
        _tokens(found, console)
    sibling = places.get((row["prompt"]["id"], row["route"]["sibling"]))
    if sibling is not None:
        _section(f"sibling shown to its teacher (sample {sibling[0]})", sibling[1], console)
    if row["verdict"]["feedback"]:
        _section("feedback", row["verdict"]["feedback"], console)
    if row["route"]["teacher_ids"]:
        _section("complete prompt of the teacher", _decoded(run, row["route"]["teacher_ids"]), console)


def _list(rows: Iterable[dict], with_values: set[SampleKey], console: Console) -> None:
    header = "sample  verdict  route  advantage  tokens  finish  values  response"
    console.print(Text(header, style="dim"), soft_wrap=True)
    for number, row in enumerate(rows):
        route, length = row["route"], policy_tokens(row)
        values_of = "tokens" if (row["prompt"]["id"], row["index"]) in with_values else ""
        line = f"{number:>6}  {_verdict(row):<7}  {route['branch']:<5}  {route['advantage']:>+9.3f}"
        line += f"  {length:>6}  {row['finish_reason']:<6}  {values_of:<6}"
        start = visible(row["text"][:60].replace("\n", " "))
        console.print(Text(f"{line}  {start}"), soft_wrap=True)


def _verdict(row: dict) -> str:
    failed = row["verdict"]["verifier_failed"]
    return visible(failed) if failed else "right" if row["verdict"]["correct"] else "wrong"


def _facts(row: dict, step: int, number: int, console: Console) -> None:
    route = row["route"]
    why = f" ({route['no_teacher'].replace('_', ' ')})" if route["no_teacher"] else ""
    title = f"step {step}, sample {number}: {visible(row['prompt']['id'])}, response {row['index']}"
    console.print(Text(title, style="bold"))
    form = "ok" if row["verdict"]["format_ok"] else "not ok"
    line = (
        f"{_verdict(row)}, reward {row['verdict']['reward']:g}, format {form}; route {route['branch']}{why}"
    )
    line += f", advantage {route['advantage']:+.3f}; {policy_tokens(row)} tokens ({row['finish_reason']})"
    console.print(Text(line))
    console.print(Text(f"ground truth: {visible(row['prompt']['answer'])}"))


def _section(title: str, text: str, console: Console) -> None:
    console.print(Text(f"\n{title}", style="cyan"))
    console.print(Text(visible(text)), soft_wrap=True)


def _tokens(values: dict[str, Any], console: Console) -> None:
    """Show the response, redder where student and teacher diverge more, then one line per token."""
    divergences = values.get("divergence", [0.0] * len(values["tokens"]))
    text = Text()
    for token, divergence in zip(values["tokens"], divergences, strict=True):
        red = round(200 * min(1.0, (divergence or 0.0) / math.log(2)))
        text.append(visible(token), style=f"on rgb({red},0,0)" if red > 8 else "")
    console.print(Text("\nresponse" + (", by divergence" if "divergence" in values else ""), style="cyan"))
    console.print(text, soft_wrap=True)
    console.print(Text("\nper token: nats, and the five most likely of student and teacher", style="cyan"))
    for place, token in enumerate(values["tokens"]):
        keys = [key for key in NUMBERS if key in values]
        numbers = [f"{key.replace('_', ' ')} {_figure(values[key][place])}" for key in keys]
        console.print(Text.assemble((_quoted(token), "bold"), "  ", ", ".join(numbers)), soft_wrap=True)
        for key, who in (("top", "student"), ("teacher_top", "teacher")):
            if key in values:
                best = "  ".join(f"{_quoted(text)} {_share(logprob)}" for text, logprob in values[key][place])
                console.print(Text(f"    {who}  {best}", style="dim"), soft_wrap=True)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(logprob: float | None) -> str:
    return "–" if logprob is None else f"{100 * math.exp(logprob):.1f}%"


def _quoted(token: str) -> str:
    return visible(token).replace("\n", "↵").replace(" ", "␣").replace("\t", "⇥")


def _decoded(run: RunFolder, ids: list[int]) -> str:
    """Decode with the model's tokenizer, if it still exists."""
    from transformers import AutoTokenizer

    for folder in (run.config.model.hf_path, run.path / "hf"):
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True).decode(ids)
    return f"{len(ids)} tokens, which cannot be decoded: {run.config.model.hf_path} does not exist"
