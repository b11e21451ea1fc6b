"""Checks of the configuration before processes communicate or weights are read."""

from collections.abc import Mapping

import numpy as np

from megatron_srpo.checkpoint.run_folder import check_run_folder
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.data.rollout_file import step_file
from megatron_srpo.distributed.device import model_dtype, uses_transformer_engine
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.distributed.processes import rank_from_environment, world_size_from_environment
from megatron_srpo.model.hf_folder import HFFolder, naming_key
from megatron_srpo.model.layout import check_layout
from megatron_srpo.model.settings import transformer_config
from megatron_srpo.observe.trackers import check_trackers
from megatron_srpo.rollout.collect import encode_prompt
from megatron_srpo.rollout.engines import check_engine
from megatron_srpo.tasks import Task, evaluation_tasks, question_count, training_tasks
from megatron_srpo.tasks.question_index import progress_of
from megatron_srpo.tasks.questions import QuestionFile

_TOKENIZED = 1000  # questions of a file; of a larger one, those that may be too long, and as many others
_JOINTS = 16  # tokens that may be more where the chat template meets a question than in the two apart


@naming_key("model.hf_path")
def preflight(config: Config, trains: bool = True) -> HFFolder:
    """Check the configuration against the model folder, the processes and the disk.

    Args:
        config: The run's configuration.
        trains: False if the weights will not change.

    Returns:
        The model folder, validated.

    Raises:
        ConfigError: The configuration cannot be run.
    """
    check_trackers(config)
    folder = HFFolder(config.model.hf_path)
    check_layout(folder.architecture, config.parallel, config.megatron)
    data_parallel_size(config.parallel, world_size_from_environment())
    uses_transformer_engine(config.model)
    transformer_config(folder.architecture, config.model, config.parallel, config.megatron)
    folder.validate()
    for task in training_tasks(config).values():  # a finite task: all prompts, which the first epoch contains
        _check_prompts(config, folder, task, "train", task.size("train") or config.rollout.prompts_per_step)
        if config.task.mixture is None:  # the run's last prompt, which an endless task may not have
            task.prompt("train", config.train.steps * config.rollout.prompts_per_step - 1)
    if config.evaluation.every > 0 and config.rollout.replay is None:
        check_evaluation(config, folder, evaluation_tasks(config))
    if rank_from_environment() == 0:
        if config.rollout.replay is None:
            check_engine(config, trains)
        check_run_folder(config, folder)
    if config.rollout.replay is not None:
        for step in range(1, config.train.steps + 1):
            if not step_file(config.rollout.replay, step).is_file():
                missing = step_file(config.rollout.replay, step)
                why = f"is missing, but train.steps is {config.train.steps}"
                hint = "its run may have removed it (logging.rollouts_limit_gib)"
                raise ConfigError(f"rollout.replay: {missing} {why}; {hint}")
    return folder


def describe_setup(config: Config, folder: HFFolder, layout: Layout) -> list[str]:
    """Return lines for the terminal: device, dtype and layers; a warning if sequences may be too long."""
    layers = "local layers, torch SDPA attention"
    if uses_transformer_engine(config.model):
        layers = "Transformer Engine"
    lines = [f"{layout.device.type}, {str(model_dtype(config.model)).removeprefix('torch.')}, {layers}"]
    prompt = config.rollout.max_prompt_tokens
    if config.algorithm.uses_teacher:
        prompt = max(prompt, config.teacher.max_prompt_tokens)
    longest = prompt + config.rollout.max_response_tokens
    positions = folder.architecture.max_position_embeddings
    if longest > positions:
        keys = "rollout.max_*_tokens, teacher.max_prompt_tokens"
        lines.append(f"sequences may reach {longest} tokens ({keys}), but the model supports {positions}")
    return lines


def check_evaluation(config: Config, folder: HFFolder, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if questions of evaluation.splits exceed rollout.max_prompt_tokens or share an id."""
    for task in tasks.values():
        for split in config.evaluation.splits:
            _check_prompts(config, folder, task, split, question_count(task, split, config.evaluation))


def _check_prompts(config: Config, folder: HFFolder, task: Task, split: str, count: int) -> None:
    if isinstance(task, QuestionFile):  # its ids are unique
        _check_questions(config, folder, task, split, count)
        return
    seen: dict[str, int] = {}
    for number in range(count):
        prompt = encode_prompt(task.prompt(split, number), folder, config.rollout)
        if (before := seen.setdefault(prompt.id, number)) != number:
            which = f"{'training' if split == 'train' else split} prompts {before} and {number}"
            raise ConfigError(
                f"task {task.name}: its {which} have the same id, {prompt.id!r}; each needs its own"
            )


def _check_questions(config: Config, folder: HFFolder, task: QuestionFile, split: str, count: int) -> None:
    """Raise ConfigError on the first rank if a question of a file is too long.

    Of a large file, only the questions are tokenized whose bytes and the chat template's tokens may be too
    many, and some others, to confirm that this is so.
    """
    if rank_from_environment() > 0:
        return
    limits = _token_limits(config, folder, task, split, count)
    is_long = limits > config.rollout.max_prompt_tokens
    if count > _TOKENIZED:
        fitting = np.flatnonzero(~is_long)
        longest = fitting[np.argsort(-limits[fitting], kind="stable")[: _TOKENIZED // 2]]
        for number in (*longest, *fitting[:: len(fitting) // _TOKENIZED * 2 + 1]):
            prompt = encode_prompt(task.prompt(split, int(number)), folder, config.rollout)
            if len(prompt.ids) > limits[number]:
                is_long[:] = True  # the chat template repeats the question, or the tokenizer rewrites it
                break
    else:
        is_long[:] = True
    numbers = np.flatnonzero(is_long)
    with progress_of(f"tokenizing {split} questions of {task.name}", int(limits[numbers].sum())) as advance:
        for number in numbers.tolist():
            encode_prompt(task.prompt(split, number), folder, config.rollout)
            advance(int(limits[number]))


def _token_limits(config: Config, folder: HFFolder, task: QuestionFile, split: str, count: int) -> np.ndarray:
    """Return a limit of each question's tokens: its bytes, and what the template adds to as many messages."""
    limits = task.most_tokens(split)[:count].astype(np.int64)
    messages = task.message_counts(split)[:count]
    for length, number in zip(*np.unique(messages, return_index=True), strict=True):
        prompt = task.prompt(split, int(number))
        empty = [{**message, "content": "x"} for message in prompt.messages]
        added = len(folder.encode(empty, config.rollout.enable_thinking))
        limits[messages == length] += added + _JOINTS
    return limits
