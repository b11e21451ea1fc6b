"""Find the checkpoint that a run resumes from, and restore its state."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import Counters, DamagedCheckpoint, Manifest, SavedFile
from megatron_srpo.checkpoint.run_folder import differences
from megatron_srpo.checkpoint.state import restore_generators, restore_trainer
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.torch_dist import Folder


class Checkpoint(NamedTuple):
    """A valid checkpoint of this run."""

    folder: Path
    manifest: Manifest


def find(config: Config, layout: Layout, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the run's newest checkpoint with intact files, or None if it has none. A collective.

    The ranks share the files to check; `say` reports skipped checkpoints.

    Raises:
        ConfigError: If there are checkpoints, but all are damaged.
    """

    def check(folder: Path, manifest: Manifest) -> str | None:
        problem = None
        try:
            folders.check_files(folder, manifest, slice(layout.rank, None, layout.world_size))
        except DamagedCheckpoint as error:
            problem = str(error)
        return next((found for found in layout.gather_json(problem) if found), None)

    directory = config.logging.dir / "checkpoints"
    if config.resume.mode == "never" or not folders.steps(directory):
        return None
    newest = folders.newest_saved(config.logging.dir)
    if newest not in (None, folders.folder_of(directory, folders.steps(directory)[0]).name):
        say(f"{directory}: its newest checkpoint, {newest}, is missing: resuming from an earlier one")
    found = folders.newest_valid(directory, check, say)
    if found is None:
        problem = f"no checkpoint in {directory.resolve()} is valid"
        raise ConfigError(f"logging.dir: {problem}; remove the run folder to start the run over")
    return Checkpoint(*found)


class Resumed(NamedTuple):
    """The state from which a run continues."""

    step: int = 0  # the last completed step
    is_evaluated: bool = False
    counters: Counters = Counters()
    carried: Path | None = None  # file of the groups left over for the next step
    metrics: SavedFile | None = None  # metrics.jsonl at that step


def restore(
    checkpoint: Checkpoint | None, trainer: Trainer, layout: Layout, say: Callable[[str], None]
) -> Resumed:
    """Restore the trainer from `checkpoint`, if any, and random states if the world size is the same."""
    if checkpoint is None:
        return Resumed()
    manifest = checkpoint.manifest
    saved = Folder(checkpoint.folder)
    restore_trainer(trainer, saved, manifest.state)
    if manifest.world_size == layout.world_size:
        restore_generators(saved, layout.rank)
    if (threads := torch.get_num_threads()) != (manifest.threads or threads):
        change = f"the checkpoint was written with {manifest.threads} threads per process, now there are"
        advice = f"for the same bits, set OMP_NUM_THREADS={manifest.threads}"
        say(f"{change} {threads}: sums are rounded differently; {advice}")
    for name, (old, new) in differences(manifest.versions, folders.package_versions()).items():
        say(f"the checkpoint was written with {name} {old}, this is {new}")
    say(f"resuming from step {manifest.step}: {checkpoint.folder}")
    is_evaluated, carried = manifest.evaluation is not None, checkpoint.folder / folders.CARRIED
    return Resumed(manifest.step, is_evaluated, manifest.counters, carried, manifest.metrics)
