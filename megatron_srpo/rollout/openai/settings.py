"""The section rollout.openai of the configuration."""

from typing import Any

from pydantic import Field

from megatron_srpo.config.engines import ServerSettings


class OpenAISettings(ServerSettings):
    """Servers with an OpenAI-compatible /v1/completions that takes and returns token ids (experimental)."""

    name = "openai"
    renormalises = None
    summary = "servers with a compatible /v1/completions (experimental)"

    model: str | None = Field(
        default=None, description="model name in requests; null: the one a server lists"
    )
    reload_path: str | None = Field(
        default=None,
        pattern="^/",
        description="POST path of each server that loads weights from a folder, such as"
        " /update_weights_from_disk; null: the servers keep their weights, and train is refused",
    )
    reload_body: dict[str, Any] = Field(
        default_factory=lambda: {"model_path": "{path}"},
        description="JSON body of the reload call; {path} and {version} are replaced in its strings",
    )
