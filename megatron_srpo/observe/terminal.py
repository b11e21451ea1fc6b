"""The terminal: a live view, or one plain line per step where the output is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.observe.alarms import Alarm
from megatron_srpo.observe.logs import LOG
from megatron_srpo.observe.stopwatch import PHASES

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw the last `width` values of [0, 1] as block characters."""
    return "".join(
        _BLOCKS[min(len(_BLOCKS) - 1, int(max(value, 0.0) * len(_BLOCKS)))] for value in values[-width:]
    )


class Terminal:
    """Shows progress if `enabled` (on rank 0)."""

    def __init__(self, title: str, steps: int, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False)
        self.title, self.steps = title, steps
        self.pass_rates: list[float] = []
        self.row: dict[str, Any] = {}
        self.phase_name = "start"
        self.alarms: list[Alarm] = []  # that hold now
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("train", total=steps)
        self.live = Live(
            console=self.console, get_renderable=self._render, refresh_per_second=4, transient=True
        )
        self.is_live = enabled and self.console.is_terminal

    def __enter__(self) -> Terminal:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.is_live:
            self.live.stop()

    def say(self, message: str, style: str = "") -> None:
        """Print and log one line."""
        LOG.info("%s", message)
        self.console.print(Text(message, style=style), soft_wrap=True)

    def phase(self, name: str) -> None:
        """Show and log that phase `name` of the step begins."""
        self.phase_name = name
        PROGRESS.enter(name)
        LOG.info("step %d: %s", PROGRESS.step, name)

    def recall(self, rows: list[dict[str, Any]]) -> None:
        """Take over the rows of metrics.jsonl of a resumed run."""
        steps = [row for row in rows if "pass_rate" in row]
        self.pass_rates = [row["pass_rate"] for row in steps]
        self.progress.update(self.task, completed=len(steps))

    def step(self, row: dict[str, Any]) -> None:
        """Show a finished training step by its row of metrics.jsonl."""
        self.row = row
        self.pass_rates.append(row["pass_rate"])
        self.progress.update(self.task, completed=row["step"])
        if not self.is_live:
            self.say(
                f"step {row['step']:>4}/{self.steps}  pass {row['pass_rate']:.3f}"
                f"  sdpo {row['sdpo_sample_share']:.2f}  length {row['response_tokens_mean']:.1f}"
                f"  loss {row['loss']:+.4f}  grad {row['grad_norm']:.3f}  entropy {row['policy_entropy']:.3f}"
                f"  gap {row['engine_logprob_gap']:.1e}  {row['seconds']:.2f} s"
            )

    def evaluation(self, row: dict[str, Any]) -> None:
        """Print a finished evaluation by its row of metrics.jsonl."""
        scores = "  ".join(
            f"{key.removeprefix('eval/')} {value:.3f}" for key, value in row.items() if "@" in key
        )
        self.say(f"evaluation after step {row['step']}: {scores}", "cyan")

    def _render(self) -> Panel:
        lines: list[Any] = [self.progress]
        row = self.row
        if row:
            table = Table.grid(padding=(0, 3))
            for _ in range(4):
                table.add_column()
            table.add_row(
                f"pass rate {row['pass_rate']:.3f}", Text(sparkline(self.pass_rates), style="green")
            )
            table.add_row(
                f"routed to SDPO {row['sdpo_sample_share']:.0%}",
                f"zero-advantage groups {row['zero_advantage_share']:.0%}",
                f"length {row['response_tokens_mean']:.1f}",
                f"truncated {row['truncated_share']:.0%}",
            )
            table.add_row(
                f"loss {row['loss']:+.4f}",
                f"grad norm {row['grad_norm']:.3f}",
                f"entropy {row['policy_entropy']:.3f}",
                f"teacher {row['teacher_entropy']:.3f}",
            )
            table.add_row(
                f"{row['tokens'] / row['seconds']:.0f} tokens/s" if row["seconds"] else "",
                f"divergence {row['distillation_divergence']:.4f}",
                f"log-prob gap {row['engine_logprob_gap']:.1e}",
                f"format {row['format_rate']:.0%}",
            )
            lines.append(table)
            lines.extend(
                Text(f"! {alarm.name}: {alarm.finding}", style="bold yellow") for alarm in self.alarms
            )
            lines.append(
                Text(
                    "  ".join(f"{name} {row.get(f'seconds_{name}', 0.0):.2f} s" for name in PHASES),
                    style="dim",
                )
            )
        lines.append(Text(f"now: {self.phase_name}", style="dim"))
        return Panel(Group(*lines), title=self.title, border_style="dim")
