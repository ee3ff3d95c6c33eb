"""From the configuration to networks that learn, and their weights for whoever scores with them. Brings torch."""

from __future__ import annotations

from torch import nn

from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import specs, weights
from recsys.model.fused import array
from recsys.model.ranker import Ranker
from recsys.model.two_tower import TwoTower


def ranker(config: Config, schema: Schema) -> Ranker:
    """The untrained ranker: bit-equal in every process with one configuration."""
    return Ranker(specs.ranker(config, schema), seed=config.seed)


def two_tower(config: Config, schema: Schema) -> TwoTower:
    """The untrained retrieval towers."""
    return TwoTower(specs.two_tower(config, schema), seed=config.seed)


def arrays(module: nn.Module) -> dict[str, weights.Array]:
    """The weights of a network that learns here: they change with it."""
    found = {name: array(value) for name, value in module.state_dict().items()}
    if isinstance(module, Ranker) and module.memory is not None:
        found[weights.PROJECTIONS] = array(module.memory.projections)
    return found
