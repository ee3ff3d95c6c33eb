"""Configuration is a value: read once, into frozen models."""

from recsys.config.load import load, one_thread_each, parse
from recsys.config.sections import (
    CatalogueConfig,
    Config,
    CounterConfig,
    FeaturesConfig,
    LogConfig,
    ModelConfig,
    ParameterConfig,
    RankingConfig,
    RetrievalConfig,
    StateConfig,
    TableConfig,
    TrainerConfig,
    TrainingConfig,
)
from recsys.config.slate import SlateConfig
from recsys.config.tasks import Section, TaskConfig

__all__ = [
    "CatalogueConfig",
    "Config",
    "CounterConfig",
    "FeaturesConfig",
    "LogConfig",
    "ModelConfig",
    "ParameterConfig",
    "RankingConfig",
    "RetrievalConfig",
    "Section",
    "SlateConfig",
    "StateConfig",
    "TableConfig",
    "TaskConfig",
    "TrainerConfig",
    "TrainingConfig",
    "load",
    "one_thread_each",
    "parse",
]
