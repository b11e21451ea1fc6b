"""A window of steps under torch's profiler, and CUDA's memory history, into RUN/profile."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_srpo.config.schema import LoggingSection
from megatron_srpo.distributed.layout import Layout

_ALLOCATIONS = 100_000  # the newest ones, kept for a memory snapshot


class StepProfiler:
    """Profile a window of steps: table, Perfetto trace and, on CUDA, memory for pytorch.org/memory_viz."""

    def __init__(self, directory: Path, settings: LoggingSection, layout: Layout):
        self.directory, self.layout = directory, layout
        self.steps = settings.profile_steps if layout.rank in settings.profile_ranks else None
        self._profile: profile | None = None

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Profile `step` if it is one of logging.profile_steps."""
        if self.steps is not None and self.steps[0] <= step <= self.steps[1] and self._profile is None:
            self._begin()
        yield
        if self._profile is not None and self.steps is not None and step >= self.steps[1]:
            self._end(self._profile)

    def _begin(self) -> None:
        cuda = self.layout.device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _end(self, profiler: profile) -> None:
        profiler.stop()
        self.directory.mkdir(exist_ok=True)
        prefix = str(self.directory / f"rank_{self.layout.rank:05d}")
        profiler.export_chrome_trace(f"{prefix}.trace.json.gz")
        by = "self_cuda_time_total" if self.layout.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=50)
        Path(f"{prefix}.table.txt").write_text(table, encoding="utf-8")
        if self.layout.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{prefix}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self.steps = None, None
