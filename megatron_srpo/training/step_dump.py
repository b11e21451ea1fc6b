"""Files of a step in RUN/rollouts: its samples, and per-token values of some of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_srpo.config.schema import LoggingSection
from megatron_srpo.data.outline import OutlineGroup
from megatron_srpo.data.records import Group
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.tokens import choose, write_tokens
from megatron_srpo.rollout.exchange import write_samples
from megatron_srpo.training.token_values import TokenValues


@dataclass(frozen=True)
class StepDump:
    """Writer of the files of logging.rollouts and logging.tokens_*; all ranks call it, rank 0 writes."""

    settings: LoggingSection
    layout: Layout
    temperature: float  # of the rollouts and of the token values
    decode: Callable[[Sequence[int]], str]  # token ids to text

    def samples(self, step: int, groups: Sequence[Group]) -> None:
        """Write the samples of `step`, if logging.rollouts is set; `groups` are this rank's. A collective."""
        if self.settings.rollouts:
            write_samples(groups, self.settings.dir / "rollouts", step, self.layout)

    def token_values(self, step: int, groups: Sequence[OutlineGroup]) -> TokenValues | None:
        """Return a recorder for the updates of `step`, or None if its tokens are not dumped."""
        every = self.settings.tokens_every
        if not self.settings.rollouts or not every or (step != 1 and step % every != 0):
            return None
        return TokenValues(choose(groups, self.settings.tokens_samples), self.layout, self.temperature)

    def tokens(self, step: int, values: TokenValues | None) -> None:
        """Write the token values that all ranks recorded. A collective."""
        rows = values.gather() if values is not None else []
        if rows:  # on rank 0
            write_tokens(rows, self.decode, self.settings.dir / "rollouts", step)
