"""Files of a step in RUN/rollouts: its samples, and per-token values of some of them."""

from collections.abc import Callable, Sequence

from megatron_srpo.config.schema import Config
from megatron_srpo.data.outline import OutlineGroup
from megatron_srpo.data.records import Group
from megatron_srpo.data.rollout_retention import Retention
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.tokens import choose, write_tokens
from megatron_srpo.rollout.exchange import write_samples
from megatron_srpo.training.token_values import TokenValues


class StepDump:
    """Writer of the files of logging.rollouts and logging.tokens_*; all ranks call it, rank 0 writes."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        decode: Callable[[Sequence[int]], str],
        say: Callable[[str], None],
    ):
        """Print by `say` how long dumps are kept; `decode` converts token ids to text."""
        self.settings, self.layout = config.logging, layout
        self.temperature = config.rollout.temperature  # of the rollouts and of the token values
        self.decode, self.say = decode, say
        self.folder = config.logging.dir / "rollouts"
        limit = config.logging.rollouts_limit_gib
        self.retention = Retention(self.folder, None if limit is None else limit * 2**30)
        if config.logging.rollouts:
            say(self.retention.describe())

    def samples(self, step: int, groups: Sequence[Group], outlines: Sequence[OutlineGroup]) -> None:
        """Write the samples of `step`, if logging.rollouts is set. A collective.

        groups: This rank's; outlines: all ranks'.
        """
        if self.settings.rollouts:
            write_samples(groups, outlines, self.folder, step, self.layout)

    def token_values(self, step: int, groups: Sequence[OutlineGroup]) -> TokenValues | None:
        """Return a recorder for the updates of `step`, or None if its tokens are not dumped."""
        every = self.settings.tokens_every
        if not self.settings.rollouts or not every or (step != 1 and step % every != 0):
            return None
        return TokenValues(choose(groups, self.settings.tokens_samples), self.layout, self.temperature)

    def tokens(self, step: int, values: TokenValues | None) -> None:
        """Write the token values that all ranks recorded, then apply the retention. A collective."""
        rows = values.gather() if values is not None else []
        if not self.settings.rollouts or self.layout.rank > 0:
            return
        if rows:
            write_tokens(rows, self.decode, self.folder, step)
        try:
            removed = self.retention.added(step)
        except OSError as error:  # somebody else removes files, too: the next step tries again
            self.say(f"step {step}: rollouts/ could not be made smaller: {error}")
            return
        if removed:
            which = ", ".join(map(str, removed[:3])) + (f", … {removed[-1]}" if len(removed) > 3 else "")
            self.say(f"step {step}: rollouts/ exceeds logging.rollouts_limit_gib; removed steps: {which}")
