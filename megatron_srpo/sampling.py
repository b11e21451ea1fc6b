"""The driver of the sample command: sample, verify, route and dump rollouts without training.

The rollouts are dumped as in a training run: `report` and `inspect` show them, `rollout.replay` trains on
them.
"""

import os
from pathlib import Path

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import save_config
from megatron_srpo.config.schema import Config, ResumeSection
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.distributed.layout import Layout, process_group
from megatron_srpo.distributed.startup import resume_collection
from megatron_srpo.evaluation.run import stored_weights
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.metrics import rollout_metrics
from megatron_srpo.observe.metrics_file import MetricsFile
from megatron_srpo.observe.session import run_session
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.preflight import preflight
from megatron_srpo.rollout.exchange import share_outlines, write_samples
from megatron_srpo.rollout.route import route
from megatron_srpo.rollout.source import open_rollouts


def sample(config: Config) -> Path:
    """Sample and dump train.steps batches with the weights of model.hf_path, or of evaluation.checkpoint.

    Returns:
        The run folder.

    Raises:
        ConfigError: The configuration is invalid for a training run, or has keys that only apply to training.
    """
    if config.rollout.replay is not None:
        raise ConfigError("rollout.replay: the sample command does not replay; remove it (train replays)")
    if config.rollout.async_steps:
        raise ConfigError(
            "rollout.async_steps: 1 overlaps sampling with training; the sample command does not train: set 0"
        )
    folder = preflight(config.model_copy(update={"resume": ResumeSection(mode="never")}), trains=False)
    with (
        process_group(config.parallel, config.train.seed) as layout,
        run_session(config.logging, f"sampling · {folder.path.name}", config.train.steps, layout) as terminal,
    ):
        _sample_steps(config, folder, layout, terminal)
    return config.logging.dir


def _sample_steps(config: Config, folder: HFFolder, layout: Layout, terminal: Terminal) -> None:
    directory, is_first = config.logging.dir, layout.rank == 0
    if is_first:
        save_config(config, directory / "config.yaml")
    # The weights do not change, so no sample gets stale; nothing is resumed, so the ledger keeps no samples.
    stays = {"rollout": config.rollout.model_copy(update={"max_staleness": config.train.steps})}
    config = config.model_copy(
        update={**stays, "checkpoint": config.checkpoint.model_copy(update={"save_interval": 0})}
    )
    watch = Stopwatch(terminal.phase)
    rollouts = open_rollouts(config, folder, layout, terminal.say, watch)
    metrics = MetricsFile(directory / "metrics.jsonl" if is_first else Path(os.devnull))
    try:
        rollouts.resume(0, 0, None)
        rollouts.publish(stored_weights(config, folder), 0)
        resume_collection()
        for step in range(1, config.train.steps + 1):
            PROGRESS.step = step
            with watch("rollout"):
                groups = route(rollouts.collect(step), step, config, folder)
                outlines = share_outlines(groups, layout)
                write_samples(groups, outlines, directory / "rollouts", step, layout)
            row = {"step": step, **rollout_metrics(outlines), **rollouts.metrics, **watch.read()}
            metrics.write(row)
            terminal.say(
                f"step {step:>4}/{config.train.steps}  pass {row['pass_rate']:.3f}"
                f"  sdpo {row['sdpo_sample_share']:.2f}  length {row['response_tokens_mean']:.1f}"
                f"  format {row['format_rate']:.2f}  {row['seconds']:.2f} s"
            )
    finally:
        rollouts.close()
        metrics.close()
    terminal.say(
        f"run folder: {directory}  (metrics.jsonl, rollouts/); train on it with rollout.replay={directory}"
    )
