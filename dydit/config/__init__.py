"""Typed, strict configurations, read from YAML with dotted overrides. Imports no torch."""

from dydit.config.loading import dump_config, find_path, load_config
from dydit.config.run import RunConfig
from dydit.config.sections import (
    ComputeConfig,
    DataConfig,
    DyDiTConfig,
    GatesConfig,
    ModelConfig,
    ObjectiveConfig,
    SamplerConfig,
    Section,
    TrainConfig,
    WarmupConfig,
)

__all__ = [
    "ComputeConfig",
    "DataConfig",
    "DyDiTConfig",
    "GatesConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RunConfig",
    "SamplerConfig",
    "Section",
    "TrainConfig",
    "WarmupConfig",
    "dump_config",
    "find_path",
    "load_config",
]
