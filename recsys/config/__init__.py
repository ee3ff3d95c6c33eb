"""Configuration is a value: read once, into frozen models."""

from recsys.config.bandit_section import BanditConfig
from recsys.config.features import CatalogueConfig, CounterConfig, FeaturesConfig
from recsys.config.loading import load, one_thread_each, parse
from recsys.config.sections import (
    Config,
    ModelConfig,
    ParameterConfig,
    RankingConfig,
    RetrievalConfig,
    TableConfig,
    TrainerConfig,
    TrainingConfig,
)
from recsys.config.slate_section import SlateConfig
from recsys.config.stores import LogConfig, StateConfig
from recsys.config.tasks import Section, TaskConfig

__all__ = [
    "BanditConfig",
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
