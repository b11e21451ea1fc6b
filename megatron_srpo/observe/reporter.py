"""Reports of a training run: metrics.jsonl, trackers, terminal, alarms, and the checks that stop it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.config.schema import Config
from megatron_srpo.data.outline import OutlineGroup
from megatron_srpo.data.update_report import UpdateReport
from megatron_srpo.distributed.files import SavedFile
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.alarms import REMEMBERED, Alarm, Limits, alarms, too_many_unjudged
from megatron_srpo.observe.metrics import rollout_metrics, update_metrics, version_metrics
from megatron_srpo.observe.metrics_file import MetricsFile
from megatron_srpo.observe.report_process import ReportProcess
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.observe.trackers import Trackers, start_trackers


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message has the reason and what to check."""


class Reporter:
    """Write a row for each step and evaluation on rank 0; all ranks compute them, to stop together."""

    def __init__(self, config: Config, layout: Layout, terminal: Terminal):
        self._config = config
        self._layout = layout
        self._terminal = terminal
        self._limits = Limits.of(config)
        self._rows: list[dict[str, Any]] = []  # of the last training steps
        self._is_first = layout.rank == 0
        file = config.logging.dir / "metrics.jsonl" if self._is_first else Path(os.devnull)
        self._metrics = MetricsFile(file)
        self._trackers = Trackers([], terminal.say)
        self.skipped_in_a_row = 0
        self._report: ReportProcess | None = None
        self._has_shown_failure = False  # of a verifier

    def resume(
        self, step: int, is_evaluated: bool, skipped_in_a_row: int, saved: SavedFile | None = None
    ) -> None:
        """Drop rows after the completed `step`, and its evaluation unless is_evaluated. Collective.

        `saved` describes metrics.jsonl at that step, if known; a damaged file is reported and kept aside.
        """
        rows, problem = self._metrics.rewind(step, is_evaluated, saved)
        if problem:
            self._terminal.say(problem, "bold red")
        self._terminal.recall(rows)
        if self._is_first:

            def warn(text: str) -> None:
                self._terminal.say(text, "bold red")

            self._trackers = Trackers(start_trackers(self._config, step, warn), warn)
        recent = [row for row in rows if "loss" in row][-REMEMBERED:]
        self._rows = self._layout.broadcast(recent)  # only the first rank has read them
        self.skipped_in_a_row = skipped_in_a_row

    def step(
        self, step: int, groups: Sequence[OutlineGroup], report: UpdateReport, extra: dict[str, Any]
    ) -> None:
        """Write the row of `step` (from 1) with `extra` metrics and raise alarms, or TrainingStopped."""
        row = {"step": step, **update_metrics(report), **rollout_metrics(groups)}
        row |= version_metrics(groups, step) | extra
        before = self._rows[-1].get("alarms", []) if self._rows else []
        self._rows = [*self._rows, row][-REMEMBERED:]
        raised = alarms(self._rows, self._limits)
        row["alarms"] = [alarm.name for alarm in raised]
        self._write(row)
        self._terminal.step(row)
        self._show_verifier_failure(step, groups)
        self._raise_alarms(step, raised, before)
        self._check_verdicts(step)
        self._check_logprob_gap(step, row["engine_logprob_gap"])
        self._check_skipped_updates(step, report)

    @property
    def metrics_file(self) -> Path:
        """The file metrics.jsonl, on rank 0."""
        return self._metrics.path

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of all evaluations so far; empty on other ranks than 0."""
        return self._metrics.evaluations()

    def evaluation(self, step: int, scores: dict[str, Any]) -> dict[str, Any]:
        """Write the row of an evaluation after `step`, and return it."""
        row = {"step": step, **scores}
        self._write(row)
        self._terminal.evaluation(row)
        return row

    def start_report(self) -> None:
        """Start to write report.html, in another process; a failure is only reported, by `summary`."""
        if self._is_first:
            try:
                self._report = ReportProcess(self._config.logging.dir)
            except OSError as error:
                self._terminal.say(f"report.html could not be written: {error}", "bold red")

    def summary(self) -> None:
        """Wait for report.html, and print the scores and the contents of the run folder."""
        problem = self._report.wait() if self._report is not None else None
        self._report = None
        if evaluations := self.evaluations:
            for key in (key for key in evaluations[-1] if "/avg@" in key):  # of every task, and their mean
                # a resumed run may have evaluated others before
                values = [row[key] for row in evaluations if row.get(key) is not None]
                if values:
                    change = f"{values[0]:.3f} before, {values[-1]:.3f} after"
                    self._terminal.say(f"{key.removeprefix('eval/')}: {change}", "bold green")
        directory = self._config.logging.dir
        contents = "report.html, metrics.jsonl, rollouts/; the trained model is in hf/"
        self._terminal.say(f"run folder: {directory}  ({contents})")
        if problem is not None:  # the run itself is complete
            self._terminal.say(f"report.html could not be written: {problem}", "bold red")

    def close_trackers(self) -> None:
        """Close the trackers; a failure is only reported."""
        self._trackers.close()

    def close(self) -> None:
        """Close metrics.jsonl, and end the report's process after an error."""
        self._metrics.close()
        if self._report is not None:
            self._report.stop()

    def _write(self, row: dict[str, Any]) -> None:
        self._metrics.write(row)
        self._trackers.write(row)

    def _raise_alarms(self, step: int, raised: list[Alarm], before: list[str]) -> None:
        """Print newly raised alarms; raise TrainingStopped for any alarm in logging.stop_on."""
        self._terminal.alarms = raised
        for alarm in raised:
            if alarm.name not in before:
                text = f"step {step}: alarm {alarm.name}: {alarm.finding}\n    {alarm.advice}"
                self._terminal.say(text, "bold yellow")
        for alarm in raised:
            if alarm.name in self._config.logging.stop_on:
                raise TrainingStopped(f"step {step}: alarm {alarm.name} (logging.stop_on): {alarm.finding}")

    def _show_verifier_failure(self, step: int, groups: Sequence[OutlineGroup]) -> None:
        """Print the run's first failure of a verifier, with its place in the verifier's file."""
        samples = [sample for group in groups for sample in group]
        failed = next((sample for sample in samples if sample.judged.verifier_failed is not None), None)
        if failed is None or self._has_shown_failure:
            return
        self._has_shown_failure = True
        which = f"the verifier of task {failed.task} failed on {failed.prompt_id}, sample {failed.index}"
        others = "later failures count in verifier_failed_share"
        self._terminal.say(f"step {step}: {which}: {failed.judged.verifier_failed}; {others}", "bold red")

    def _check_verdicts(self, step: int) -> None:
        if (found := too_many_unjudged(self._rows)) is not None:
            advice = "correct the verifier, task.verifier_seconds or task.verifier_memory_mib"
            raise TrainingStopped(f"step {step}: {found}; {advice}")

    def _check_logprob_gap(self, step: int, gap: float) -> None:
        """Raise TrainingStopped if trainer and engine disagree; skip replayed samples of another policy."""
        rollout = self._config.rollout
        limit = rollout.logprob_gap_stop
        if rollout.replay is not None or limit is None or gap < limit + rollout.nucleus_gap:
            return
        found = f"log-probabilities of trainer and engine differ by {gap:.3g} nats per token"
        advice = "check that the engine has the published weights"
        raise TrainingStopped(f"step {step}: {found} (rollout.logprob_gap_stop); {advice}")

    def _check_skipped_updates(self, step: int, report: UpdateReport) -> None:
        for update in report.skipped_updates:
            numbers = f"loss {update.loss}, gradient norm {update.grad_norm}"
            self._terminal.say(f"step {step}: an update was skipped: {numbers}", "bold red")
        self.skipped_in_a_row = report.skipped_in_a_row(self.skipped_in_a_row)
        if self.skipped_in_a_row >= self._config.train.max_skipped_updates:
            updates = f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient norm"
            kept = "hf/ holds the weights of the last finite update"
            raise TrainingStopped(f"step {step}: {updates} (train.max_skipped_updates); {kept}")
