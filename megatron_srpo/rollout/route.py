"""Route verified groups with the run's settings."""

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group
from megatron_srpo.model.hf_folder import HFFolder


def route(groups: list[Group], step: int, config: Config, folder: HFFolder) -> list[Group]:
    """Return the verified groups of `step` with routes: advantage, branch, the teacher's prompt."""
    return route_groups(
        groups,
        config.algorithm,
        encode=lambda messages: folder.encode(messages, config.rollout.enable_thinking),
        max_teacher_prompt_tokens=config.teacher.max_prompt_tokens,
        seed=f"{config.train.seed}/{step}",
        feedback=config.teacher.feedback,
    )
