"""The terminal: a live view, or one plain line per step if the output is not a terminal."""

from __future__ import annotations

from typing import Any

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_srpo.data.visible import visible
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.observe.alarms import Alarm
from megatron_srpo.observe.logs import LOG
from megatron_srpo.observe.stopwatch import PHASES

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw the last `width` values of [0, 1] as block characters."""
    heights = [int(max(value, 0.0) * len(_BLOCKS)) for value in values[-width:]]
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, height)] for height in heights)


class Terminal:
    """Show progress if `enabled` (on rank 0)."""

    def __init__(self, title: str, steps: int, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False)
        self.title, self.steps = title, steps
        self.pass_rates: list[float] = []
        self.row: dict[str, Any] = {}
        self.phase_name = "start"
        self.alarms: list[Alarm] = []  # active now
        done = (progress.TextColumn("step"), progress.MofNCompleteColumn(), progress.BarColumn(None))
        left = (progress.TextColumn("left"), progress.TimeRemainingColumn())
        self.progress = progress.Progress(*done, progress.TimeElapsedColumn(), *left)
        self.task = self.progress.add_task("train", total=steps)
        view: dict[str, Any] = {"get_renderable": self._render, "refresh_per_second": 4, "transient": True}
        self.live = Live(console=self.console, **view)
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
        self.console.print(Text(visible(message), style=style), soft_wrap=True)

    def phase(self, name: str) -> None:
        """Show and log that phase `name` of the step begins."""
        self.phase_name = name
        PROGRESS.enter(name)
        LOG.info("step %d: %s", PROGRESS.step, name)

    def recall(self, rows: list[dict[str, Any]]) -> None:
        """Restore the progress of a resumed run by its rows of metrics.jsonl."""
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
        scores = [f"{key.removeprefix('eval/')} {value:.3f}" for key, value in row.items() if "@" in key]
        self.say(f"evaluation after step {row['step']}: {'  '.join(scores)}", "cyan")

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
            routes = f"routed to SDPO {row['sdpo_sample_share']:.0%}"
            flat = f"zero-advantage groups {row['zero_advantage_share']:.0%}"
            lengths = (f"length {row['response_tokens_mean']:.1f}", f"truncated {row['truncated_share']:.0%}")
            table.add_row(routes, flat, *lengths)
            updates = (f"loss {row['loss']:+.4f}", f"grad norm {row['grad_norm']:.3f}")
            entropies = (f"entropy {row['policy_entropy']:.3f}", f"teacher {row['teacher_entropy']:.3f}")
            table.add_row(*updates, *entropies)
            speed = f"{row['tokens'] / row['seconds']:.0f} tokens/s" if row["seconds"] else ""
            divergence = f"divergence {row['distillation_divergence']:.4f}"
            gap = f"log-prob gap {row['engine_logprob_gap']:.1e}"
            table.add_row(speed, divergence, gap, f"format {row['format_rate']:.0%}")
            lines.append(table)
            for alarm in self.alarms:
                lines.append(Text(f"! {alarm.name}: {alarm.finding}", style="bold yellow"))
            seconds = [f"{name} {row.get(f'seconds_{name}', 0.0):.2f} s" for name in PHASES]
            lines.append(Text("  ".join(seconds), style="dim"))
        lines.append(Text(f"now: {self.phase_name}", style="dim"))
        return Panel(Group(*lines), title=self.title, border_style="dim")
