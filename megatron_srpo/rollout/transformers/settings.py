"""The embedded engine's properties; its only setting, rollout.batch_size, is older than engines' sections."""

from megatron_srpo.config.engines import EngineSettings


class TransformersSettings(EngineSettings):
    """No fields: there is no section rollout.transformers."""

    name = "transformers"
    summary = "its model in this process"
    in_process = True
