"""The embedded engine's properties; its only setting is rollout.batch_size."""

from megatron_srpo.config.engines import EngineSettings


class TransformersSettings(EngineSettings):
    """No fields: there is no section rollout.transformers."""

    name = "transformers"
    summary = "its model in this process"
    in_process = True
    renormalises = True
