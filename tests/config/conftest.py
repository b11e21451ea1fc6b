"""Provide a configuration from text, and the error message of an invalid text."""

import re

import pytest

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config


@pytest.fixture
def config_of(tmp_path):
    """Return a function that loads a YAML text; error messages name a file called config.yaml."""

    def load(text, *overrides):
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def message_of(config_of):
    """Return a function that gives the ConfigError's text, without the folder's name."""

    def refuse(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            config_of(text, *overrides)
        return re.sub(r"\S*/config\.yaml", "config.yaml", str(caught.value))

    return refuse
