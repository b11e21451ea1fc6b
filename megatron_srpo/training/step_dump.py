"""Files of a step under RUN/rollouts: its samples, and the values of single tokens of some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_srpo.config.schema import LoggingSection
from megatron_srpo.data.records import Group
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.tokens import choose, write_tokens
from megatron_srpo.training.token_values import TokenValues


class StepDump:
    """Writes what logging.rollouts and logging.tokens_* ask for; the first rank writes, all ranks call.

    Args:
        settings: the logging section.
        layout: this process's layout.
        temperature: of the rollouts; token values are taken at it.
        decode: turns token ids into text.
    """

    def __init__(
        self,
        settings: LoggingSection,
        layout: Layout,
        temperature: float,
        decode: Callable[[Sequence[int]], str],
    ):
        self._settings = settings
        self._layout = layout
        self._temperature = temperature
        self._decode = decode
        self._folder = settings.dir / "rollouts"

    def samples(self, step: int, groups: Sequence[Group]) -> None:
        """Write all samples of `step`."""
        if self._settings.rollouts and self._layout.rank == 0:
            dump(groups, self._folder, step)

    def token_values(self, step: int, groups: Sequence[Group]) -> TokenValues | None:
        """Return a recorder for the update of `step`, or None if its tokens are not dumped."""
        every = self._settings.tokens_every
        if not self._settings.rollouts or not every or (step != 1 and step % every != 0):
            return None
        chosen = choose(groups, self._settings.tokens_samples)
        return TokenValues(chosen, self._layout, self._temperature)

    def tokens(self, step: int, groups: Sequence[Group], values: TokenValues | None) -> None:
        """Write what `values` recorded on all ranks. All ranks together."""
        rows = values.gather() if values is not None else []
        if rows and self._layout.rank == 0:
            write_tokens(rows, groups, self._decode, self._folder, step)
