"""The run's configuration: a typed tree with every key's default and limits, and rules between keys."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from megatron_srpo.algorithm import AnyAlgorithm
from megatron_srpo.algorithm.methods.srpo import SRPO
from megatron_srpo.config.base import Section
from megatron_srpo.config.engines import ENGINE_SECTIONS
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.config.task_section import TaskSection, TaskSource


class ModelSection(Section):
    """The policy's architecture, initial weights and layer implementation."""

    hf_path: Path = Field(
        description="Hugging Face folder (config.json, safetensors, tokenizer); defines the architecture"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto", description="auto: transformer_engine if installed and on CUDA, else local"
    )
    make_vocab_size_divisible_by: int = Field(
        default=16, gt=0, description="pad the vocabulary to a multiple of this times TP"
    )


class ParallelSection(Section):
    """Megatron's parallel layout."""

    tensor_model_parallel_size: int = Field(
        default=1, gt=0, description="TP: ranks that share each layer's matrices"
    )
    pipeline_model_parallel_size: int = Field(
        default=1, gt=0, description="PP: pipeline stages that share the layers"
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None, gt=1, description="model chunks per pipeline rank (interleaved 1F1B)"
    )
    context_parallel_size: int = Field(
        default=1, gt=0, description="CP: ranks that share each sequence's tokens"
    )
    expert_model_parallel_size: int = Field(
        default=1, gt=0, description="EP: ranks that share a layer's experts, each with different tokens"
    )
    expert_tensor_parallel_size: int | None = Field(
        default=None, gt=0, description="ranks that share an expert's matrices; null: the same as TP"
    )
    sequence_parallel: bool = Field(
        default=False, description="split activations outside TP regions along the sequence; needs TP > 1"
    )
    use_distributed_optimizer: bool = Field(
        default=True, description="shard the optimizer's state over the data-parallel ranks"
    )
    overlap_grad_reduce: bool | None = Field(
        default=None, description="reduce gradients during the backward pass; null: on CUDA"
    )
    overlap_param_gather: bool | None = Field(
        default=None, description="gather weights in the next forward pass; null: on CUDA, if distributed"
    )
    ddp_bucket_size: int | None = Field(
        default=None, gt=0, description="parameters per gradient bucket; null: Megatron's, 40 million or more"
    )
    distributed_timeout_minutes: float = Field(
        default=10, gt=0, description="timeout of a collective, after which the run ends"
    )

    @property
    def replica_size(self) -> int:
        """Number of ranks that train the same samples."""
        model_ranks = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return model_ranks * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Number of ranks that share each expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @model_validator(mode="after")
    def _consistent(self):
        tensor_size = self.tensor_model_parallel_size
        if self.sequence_parallel and tensor_size == 1:
            raise ValueError("sequence_parallel: true needs tensor_model_parallel_size > 1")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("overlap_param_gather: true needs use_distributed_optimizer: true")
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise ValueError(
                "overlap_param_gather: true needs overlap_grad_reduce, as Megatron overlaps both"
            )
        if self.expert_model_parallel_size == 1 and self.expert_tensor_size != tensor_size:
            raise ValueError(
                "expert_tensor_parallel_size other than tensor_model_parallel_size needs"
                " expert_model_parallel_size > 1"
            )
        return self


class TeacherSection(Section):
    """The self-teacher: its weights and its prompt."""

    kind: Literal["ema", "frozen", "live", "trust_region"] = Field(
        default="ema",
        description="ema: θ' ← (1-rate) θ' + rate θ after each step, fp32; frozen: the initial model;"
        " live: the policy; trust_region: softmax of (1-a) z_initial + a z_policy",
    )
    ema_rate: float = Field(default=0.05, gt=0, le=1, description="rate of ema")
    interpolation: float = Field(
        default=0.05, gt=0, lt=1, description="a of trust_region: the policy's share of the logits"
    )
    max_prompt_tokens: int = Field(
        default=10240, gt=0, description="limit of a teacher's prompt; the demonstration is shortened to fit"
    )
    feedback: Literal["off", "without_solution", "always"] = Field(
        default="off",
        description="show a failed sample's environment feedback to its teacher; without_solution: only if no"
        " sibling is correct; always: also next to a solution. It is shown unchanged and may hold the answer",
    )


class OptimizerSection(Section):
    """AdamW with linear warm-up and a constant learning rate."""

    lr: float | None = Field(default=None, gt=0, description="peak learning rate; null: algorithm.lr")
    lr_warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up, then constant")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay; not for norms")
    clip_grad: float = Field(default=1.0, gt=0, description="limit of the global gradient norm")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of Adam's second moment")
    adam_eps: float = Field(default=1e-8, gt=0, description="added to the root of Adam's second moment")
    optimizer_cpu_offload: bool = Field(
        default=False, description="keep fp32 weights, Adam's moments and EMA in host memory between updates"
    )


class TrainSection(Section):
    """Length, seed and memory limits of the training."""

    steps: int = Field(gt=0, description="training steps, each with one rollout batch")
    seed: int = Field(default=1, ge=0, description="seed of prompts, sampling and routing")
    micro_batch_tokens: int = Field(
        default=20480,
        gt=0,
        description="tokens per packed micro-batch and context-parallel rank; a longer sequence gets a"
        " micro-batch to itself",
    )
    logits_memory_mib: int | None = Field(
        default=None, gt=0, description="MiB for tiles of logits (speed only); null: 320 on CPU, 2048 on CUDA"
    )
    max_skipped_updates: int = Field(
        default=3, gt=0, description="stop after this many non-finite updates in a row"
    )


class EvaluationSection(Section):
    """Evaluation during training, and `srpo eval`."""

    every: int = Field(
        default=5, ge=0, description="steps between evaluations, first and last included; 0: never"
    )
    tasks: list[TaskSource] | None = Field(
        default=None, description="tasks as in task.mixture, or names of training tasks; null: all of these"
    )
    splits: list[Literal["test", "validation"]] = Field(
        default=["test"], min_length=1, description="validation: held out of the training questions"
    )
    prompts: int | None = Field(
        default=64, gt=0, description="number of questions per task and split, from the first; null: all"
    )
    samples: int = Field(default=16, gt=0, description="samples per question: K of avg@K and pass@K")
    temperature: float = Field(default=0.6, ge=0, description="0: greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling; 1: off")
    checkpoint: Path | None = Field(
        default=None,
        description="srpo eval, sample: a checkpoint, or a run for its newest, instead of model.hf_path",
    )
    greedy: bool = Field(default=True, description="srpo eval: also sample one greedy answer per question")

    @model_validator(mode="after")
    def _greedy_once(self):
        if self.temperature == 0 and self.samples != 1:
            raise ValueError(
                "temperature: 0 is greedy, and all samples of a prompt are equal: set samples: 1"
            )
        return self


class CheckpointSection(Section):
    """Checkpoints of the run, and its time limit."""

    save_interval: int = Field(
        default=10, ge=0, description="steps between checkpoints, also after the last step; 0: never"
    )
    async_save: bool = Field(default=True, description="write them while training continues")
    keep_last: int = Field(default=2, gt=0, description="number of the newest checkpoints to keep")
    keep_best: int = Field(
        default=1, ge=0, description="number of others to keep, the best by the first task's avg@K"
    )
    exit_duration_in_mins: float | None = Field(
        default=None, gt=0, description="save and exit after this many minutes"
    )


_TRAINING_KEYS = ("optimizer.lr", "train.steps", "train.micro_batch_tokens", "train.logits_memory_mib")
_ROLLOUT_KEYS = ("batch_size", "urls", "servers", "colocated", *ENGINE_SECTIONS)
_OVERRIDABLE = ("parallel", *_TRAINING_KEYS, *(f"rollout.{key}" for key in _ROLLOUT_KEYS))


class ResumeSection(Section):
    """Resuming a run from its folder."""

    mode: Literal["auto", "never"] = Field(
        default="auto", description="auto: resume the run in the run folder; never: refuse a used folder"
    )
    override: tuple[str, ...] = Field(
        default=(*_OVERRIDABLE, "evaluation", "checkpoint", "logging"),
        description="keys and sections that may differ when resuming",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value):
        return {"mode": value} if isinstance(value, str) else value


AlarmName = Literal[
    "collapse",
    "dead_groups",
    "teacher_still",
    "uniform_weights",
    "logprob_gap",
    "samples_dropped",
    "verifier_failures",
]


class LoggingSection(Section):
    """The run folder, trackers, profiler, token dumps, alarms and watchdog."""

    dir: Path = Field(description="the run folder")
    rollouts: bool = Field(default=True, description="dump every sample, one file per step (replayable)")
    rollouts_limit_gib: float | None = Field(
        default=100,
        gt=0,
        description="size of RUN/rollouts above which steps are removed, oldest first, down to 3/4 of it;"
        " kept are step 1, the newest 10 and every 2nd step, or every 4th, 8th, …; null: keep all",
    )
    tensorboard: bool = Field(default=False, description="event files in RUN/tensorboard")
    wandb_project: str | None = Field(default=None, description="Weights & Biases project; null: off")
    wandb_exp_name: str | None = Field(
        default=None, description="Weights & Biases run name; null: the run folder's name"
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", description="offline: kept in RUN/wandb, for `wandb sync`"
    )
    profile_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step to trace with torch's profiler, into RUN/profile"
    )
    profile_ranks: tuple[int, ...] = Field(default=(0,), description="ranks that are profiled")
    tokens_every: int = Field(
        default=10, ge=0, description="steps between dumps of per-token values, also at step 1; 0: never"
    )
    tokens_samples: int = Field(default=8, gt=0, description="samples per dump of per-token values")
    dead_group_share: float = Field(
        default=0.9, gt=0, le=1, description="share of groups with equal rewards that raises dead_groups"
    )
    stop_on: tuple[AlarmName, ...] = Field(
        default=(),
        description="alarms that stop the run (docs/metrics.md, Alarms); the others are only reported",
    )
    watchdog_minutes: float | None = Field(
        default=8.0,
        gt=0,
        description="minutes without progress on a rank until all stacks are written and the run ends; null:"
        " never. Keep it below parallel.distributed_timeout_minutes, which reports only one rank",
    )

    @model_validator(mode="after")
    def _window(self):
        steps = self.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps: {list(steps)}: expected [first, last], steps from 1")
        return self


class Config(Section):
    """The configuration of a run."""

    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    task: TaskSection = TaskSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AnyAlgorithm = SRPO()
    teacher: TeacherSection = TeacherSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: ResumeSection = Field(default=ResumeSection(), description="short form: resume: auto | never")
    logging: LoggingSection
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="passed to megatron-core's TransformerConfig, by field name"
    )

    @property
    def lr(self) -> float:
        """Peak learning rate: optimizer.lr or algorithm.lr."""
        return self.optimizer.lr or self.algorithm.lr

    @property
    def mini_batch_prompts(self) -> int:
        """Prompts per optimizer step: algorithm.mini_batch_prompts, at most the entire batch."""
        batch = self.rollout.prompts_per_step
        return min(self.algorithm.mini_batch_prompts or batch, batch)

    @property
    def evaluation_tasks(self) -> tuple[TaskSource, ...]:
        """The tasks to evaluate; a bare name refers to the training task of that name, if there is one.

        A file or folder that is also trained on is split as in training, unless shares are given, so that no
        training question is evaluated.
        """
        if self.evaluation.tasks is None:
            return self.task.sources
        trained = {source.name: source for source in self.task.sources}
        by_path = {source.path.resolve(): source for source in self.task.sources if source.path is not None}
        found = []
        for source in self.evaluation.tasks:
            path = source.path
            if source == TaskSource(name=source.name):
                source = trained.get(source.name, source)
            elif path is not None and (twin := by_path.get(path.resolve())):
                missing = [key for key in ("test_share", "validation_share") if not getattr(source, key)]
                source = source.model_copy(update={key: getattr(twin, key) for key in missing})
            elif source.test_share is None and path is not None and path.suffix == ".jsonl":
                source = source.model_copy(update={"test_share": 1.0})  # nothing is trained on it
            found.append(source)
        return tuple(found)

    @model_validator(mode="after")
    def _contradictions(self):
        rollout, mini_batch = self.rollout, self.mini_batch_prompts
        if rollout.samples_per_prompt < 2:
            needed = f"{self.algorithm.name} compares the samples of a group, so it needs at least 2, not 1"
            raise ValueError(f"rollout.samples_per_prompt: {needed}")
        for key in self.resume.override:
            if not _is_key(self, key):
                expected = "expected a key or a section of the configuration, such as optimizer.lr"
                raise ValueError(f"resume.override: {key!r} is not a key; {expected}")
        stale = f"rollout.max_staleness: {rollout.max_staleness}, but with rollout.async_steps: 1"
        if rollout.async_steps > rollout.max_staleness:
            raise ValueError(f"{stale} every sample is one version old; set 1")
        continues = rollout.over_sampling > 1 or rollout.dynamic_filtering
        if rollout.async_steps and rollout.max_staleness < 2 and continues:
            problem = "partial rollouts of over_sampling and dynamic_filtering are two versions old"
            raise ValueError(f"{stale} {problem}, and would all be discarded: set 2")
        if rollout.prompts_per_step % mini_batch:
            problem = (
                f"is not a multiple of algorithm.mini_batch_prompts ({mini_batch}; null: the entire batch)"
            )
            raise ValueError(f"rollout.prompts_per_step: {rollout.prompts_per_step} {problem}")
        return self


def _is_key(section: Any, key: str) -> bool:
    """Return True if the section has this dotted key; a mapping accepts any key."""
    name, _, rest = key.partition(".")
    if not isinstance(section, BaseModel):
        return isinstance(section, dict)
    return name in type(section).model_fields and (not rest or _is_key(getattr(section, name), rest))
