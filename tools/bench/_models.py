"""Provide config.json of Qwen3 in the published sizes, for models with random weights."""

from __future__ import annotations

from typing import Any

from megatron_srpo.plan.models import published_config

SIZES = ("0.6b", "1.7b", "4b", "8b")


def qwen3_config(size: str) -> dict[str, Any]:
    """Return the config.json of a size; embeddings are tied below 8b."""
    return published_config(f"Qwen/Qwen3-{size.upper()}")
