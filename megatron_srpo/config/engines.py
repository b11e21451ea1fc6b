"""The rollout engines by name, and what planner and checks must know of each without importing it."""

from typing import Literal, NamedTuple

EngineName = Literal["transformers", "sglang", "openai"]


class EngineTraits(NamedTuple):
    """Properties of a rollout engine that the configuration and the planner depend on.

    Attributes:
        in_process: every rank holds a copy of the model; otherwise rollout.urls or rollout.servers sample.
        starts_servers: the run can start servers (rollout.servers) and share their GPUs (rollout.colocated).
    """

    in_process: bool
    starts_servers: bool


# Each name is a folder of megatron_srpo/rollout with a module `engine` (see rollout/engines.py).
ENGINES: dict[EngineName, EngineTraits] = {
    "transformers": EngineTraits(in_process=True, starts_servers=False),
    "sglang": EngineTraits(in_process=False, starts_servers=True),
    "openai": EngineTraits(in_process=False, starts_servers=False),
}
