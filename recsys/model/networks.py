"""From the configuration to networks that learn."""

from __future__ import annotations

from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import specs
from recsys.model.ranker import Ranker
from recsys.model.two_tower import TwoTower


def ranker(config: Config, schema: Schema) -> Ranker:
    """The untrained ranker: bit-equal in every process with one configuration."""
    return Ranker(specs.ranker(config, schema), seed=config.seed)


def two_tower(config: Config, schema: Schema) -> TwoTower:
    """The untrained retrieval towers."""
    return TwoTower(specs.two_tower(config, schema), seed=config.seed)
