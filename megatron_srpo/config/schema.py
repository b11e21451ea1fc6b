"""The run's configuration: one typed tree with every key's default and bounds, and rules between keys."""

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
    hf_path: Path = Field(
        description="Hugging Face folder (config.json, safetensors, tokenizer); defines the architecture"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto", description="auto: transformer_engine where installed and on CUDA, else local"
    )
    make_vocab_size_divisible_by: int = Field(
        default=16, gt=0, description="pad the vocabulary to a multiple of this times TP"
    )


class ParallelSection(Section):
    tensor_model_parallel_size: int = Field(default=1, gt=0)
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None, gt=1, description="model chunks per pipeline rank (interleaved 1F1B)"
    )
    context_parallel_size: int = Field(default=1, gt=0, description="ranks that share each sequence's tokens")
    expert_model_parallel_size: int = Field(
        default=1, gt=0, description="ranks that share a layer's experts; they have other tokens"
    )
    expert_tensor_parallel_size: int | None = Field(
        default=None, gt=0, description="ranks that share an expert's matrices; null: as tensor parallelism"
    )
    sequence_parallel: bool = False
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
        default=10, gt=0, description="a collective that waits longer ends the run"
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
    kind: Literal["ema", "frozen", "live", "trust_region"] = Field(
        default="ema",
        description="ema: θ' ← (1-rate) θ' + rate θ after each step, fp32; frozen: the initial model;"
        " live: the policy; trust_region: softmax of (1-a) z_initial + a z_policy",
    )
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    interpolation: float = Field(
        default=0.05, gt=0, lt=1, description="a of trust_region: the policy's share of the logits"
    )
    max_prompt_tokens: int = Field(default=10240, gt=0, description="the demonstration is shortened to fit")
    feedback: Literal["off", "without_solution", "always"] = Field(
        default="off",
        description="show a failed sample's environment feedback to its teacher: never; if no sibling is"
        " correct; or beside the solution, too. Your data's feedback is shown as is: it may hold the answer",
    )


class OptimizerSection(Section):
    lr: float | None = Field(default=None, gt=0, description="null: the algorithm's own")
    lr_warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up, then constant")
    weight_decay: float = Field(default=0.01, ge=0)
    clip_grad: float = Field(default=1.0, gt=0, description="global gradient norm")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    optimizer_cpu_offload: bool = Field(
        default=False, description="keep fp32 weights, Adam's moments and EMA in host memory"
    )


class TrainSection(Section):
    steps: int = Field(gt=0)
    seed: int = Field(default=1, ge=0)
    micro_batch_tokens: int = Field(
        default=20480,
        gt=0,
        description="tokens of a packed micro-batch on one rank (context-parallel ranks share as many times"
        " more); a longer sequence gets a micro-batch of its own",
    )
    logits_memory_mib: int | None = Field(
        default=None, gt=0, description="for tiles of logits (speed only); null: CPU 320, CUDA 2048"
    )
    max_skipped_updates: int = Field(
        default=3, gt=0, description="stop after this many non-finite updates in a row"
    )


class EvaluationSection(Section):
    every: int = Field(
        default=5, ge=0, description="steps between evaluations, first and last included; 0: never"
    )
    tasks: list[TaskSource] | None = Field(
        default=None, description="tasks as in task.mixture, or training tasks' names; null: those"
    )
    splits: list[Literal["test", "validation"]] = Field(
        default=["test"], min_length=1, description="validation: held out of the training questions"
    )
    prompts: int | None = Field(
        default=64, gt=0, description="questions of each task and split, the first of them; null: all"
    )
    samples: int = Field(default=16, gt=0, description="samples a prompt: K of avg@K and pass@K")
    temperature: float = Field(default=0.6, ge=0, description="0: greedy")
    top_p: float = Field(default=0.95, gt=0, le=1)
    checkpoint: Path | None = Field(
        default=None, description="eval: use this run's newest (or this) checkpoint, not model.hf_path"
    )
    greedy: bool = Field(default=True, description="eval: also take one greedy answer to each question")

    @model_validator(mode="after")
    def _greedy_once(self):
        if self.temperature == 0 and self.samples != 1:
            raise ValueError(
                "temperature: 0 is greedy, and all samples of a prompt are equal: set samples: 1"
            )
        return self


class CheckpointSection(Section):
    save_interval: int = Field(
        default=10, ge=0, description="steps between checkpoints, also after the last step; 0: never"
    )
    async_save: bool = Field(default=True, description="write them while training continues")
    keep_last: int = Field(default=2, gt=0, description="number of the newest checkpoints to keep")
    keep_best: int = Field(
        default=1, ge=0, description="number of others to keep, by evaluation (the first task's avg@K)"
    )
    exit_duration_in_mins: float | None = Field(
        default=None, gt=0, description="save and exit when the run has lasted this long"
    )


_TRAINING_KEYS = ("optimizer.lr", "train.steps", "train.micro_batch_tokens", "train.logits_memory_mib")
_ROLLOUT_KEYS = ("batch_size", "urls", "servers", "colocated", *ENGINE_SECTIONS)
_OVERRIDABLE = ("parallel", *_TRAINING_KEYS, *(f"rollout.{key}" for key in _ROLLOUT_KEYS))


class ResumeSection(Section):
    mode: Literal["auto", "never"] = Field(
        default="auto", description="auto: resume the run that the run folder holds; never: refuse to"
    )
    override: tuple[str, ...] = Field(
        default=(*_OVERRIDABLE, "evaluation", "checkpoint", "logging"),
        description="keys and sections that may differ when resuming",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value):
        return {"mode": value} if isinstance(value, str) else value


AlarmName = Literal["collapse", "dead_groups", "teacher_still", "uniform_weights", "logprob_gap"]


class LoggingSection(Section):
    dir: Path = Field(description="the run folder")
    rollouts: bool = Field(default=True, description="dump every sample, one file a step (replayable)")
    tensorboard: bool = Field(default=False, description="event files in RUN/tensorboard")
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project; null: no logging there"
    )
    wandb_exp_name: str | None = Field(
        default=None, description="the run's name there; null: the run folder's"
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", description="offline: kept in RUN/wandb, for `wandb sync`"
    )
    profile_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step under torch's profiler, into RUN/profile"
    )
    profile_ranks: tuple[int, ...] = Field(default=(0,), description="ranks that are profiled")
    tokens_every: int = Field(
        default=10, ge=0, description="steps between dumps of single tokens' values, from the first; 0: never"
    )
    tokens_samples: int = Field(default=8, gt=0, description="samples whose tokens are dumped then")
    dead_group_share: float = Field(
        default=0.9, gt=0, le=1, description="share of groups with equal rewards that raises dead_groups"
    )
    stop_on: tuple[AlarmName, ...] = Field(
        default=(), description="alarms that stop the run (README, Alarms); the others are only reported"
    )
    watchdog_minutes: float | None = Field(
        default=8.0,
        gt=0,
        description="minutes without progress on any rank until stacks are written and the run ends; null:"
        " never. Keep it below parallel.distributed_timeout_minutes, which reports one rank only",
    )

    @model_validator(mode="after")
    def _window(self):
        steps = self.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps: {list(steps)}: expected [first, last], steps from 1")
        return self


class Config(Section):
    """Everything a run depends on."""

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
        """Peak learning rate: optimizer.lr or the algorithm's own."""
        return self.optimizer.lr or self.algorithm.lr

    @property
    def mini_batch_prompts(self) -> int:
        """Prompts per optimizer step: the algorithm's, or the whole batch where that is not larger."""
        batch = self.rollout.prompts_per_step
        return min(self.algorithm.mini_batch_prompts or batch, batch)

    @property
    def evaluation_tasks(self) -> tuple[TaskSource, ...]:
        """The tasks evaluated; a bare name means the training task of that name, if there is one.

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
                raise ValueError(f"resume.override: {key!r} is no key and no section of the configuration")
        stale = f"rollout.max_staleness: {rollout.max_staleness}, but with rollout.async_steps: 1"
        if rollout.async_steps > rollout.max_staleness:
            raise ValueError(f"{stale} every sample is one version old; set 1")
        continues = rollout.over_sampling > 1 or rollout.dynamic_filtering
        if rollout.async_steps and rollout.max_staleness < 2 and continues:
            problem = "what over_sampling and dynamic_filtering continue is two versions old"
            raise ValueError(f"{stale} {problem}, and would all be discarded: set 2")
        if rollout.prompts_per_step % mini_batch:
            problem = (
                f"is not a multiple of algorithm.mini_batch_prompts ({mini_batch}; null: the whole batch)"
            )
            raise ValueError(f"rollout.prompts_per_step: {rollout.prompts_per_step} {problem}")
        return self


def _is_key(section: Any, key: str) -> bool:
    """Return True if `key` (dotted) names something in the section; a mapping may hold any key."""
    name, _, rest = key.partition(".")
    if not isinstance(section, BaseModel):
        return isinstance(section, dict)
    return name in type(section).model_fields and (not rest or _is_key(getattr(section, name), rest))
