"""One start of a run in its folder: open and close its lock, logs, watchdog and terminal together."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_srpo.config.schema import LoggingSection
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.logs import rank_log
from megatron_srpo.observe.run_lock import open_run_folder, run_lock
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.observe.watchdog import Watchdog


@contextmanager
def run_session(settings: LoggingSection, title: str, steps: int, layout: Layout) -> Iterator[Terminal]:
    """Open settings.dir and yield its terminal. A collective call; ConfigError if the folder is in use."""
    directory = settings.dir
    session = open_run_folder(directory, layout)
    title += f" · {layout.world_size} process{'es' * (layout.world_size > 1)}"
    with (
        run_lock(directory, layout),
        rank_log(directory, layout),
        Watchdog(directory / "watchdog", layout, settings.watchdog_minutes, session),
        Terminal(title, steps, layout.rank == 0) as terminal,
    ):
        yield terminal
