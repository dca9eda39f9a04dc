"""YAML -> validated config."""

from ultrazoo.config.around import model_around
from ultrazoo.config.load import Config, LoadedConfig, config_from_dict, load_config
from ultrazoo.config.model import ModelConfig, block_config
from ultrazoo.config.schema import json_schema
from ultrazoo.config.training import TrainingConfig

__all__ = [
    "Config",
    "LoadedConfig",
    "ModelConfig",
    "TrainingConfig",
    "block_config",
    "config_from_dict",
    "json_schema",
    "load_config",
    "model_around",
]
