"""Parameters of a learner in the same process, as it learns: for replays and tests, which serve and train by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recsys.bandit.graph import Published
from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import scoring, specs
from recsys.model.plan import Block
from recsys.model.tower_scoring import Towers
from recsys.model.weights import Weights
from recsys.parameters.base import ParameterState, Reply
from recsys.parameters.dense_weights import Networks
from recsys.table.tables import Tables


class OwnRows:
    """Rows straight from a learner's tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        values = tuple(self._tables[block.layout].lookup(block.slots, block.keys)[0] for block in blocks)
        return Reply(values=values, state=ParameterState())

    def dense(self) -> tuple[int, bytes]:
        return 0, b""


class OwnNetworks:
    """A learner's weights themselves (`networks.arrays`). `refresh` after each step: the kernels' copy of them is of the last one."""

    def __init__(
        self, config: Config, ranker: Weights, towers: Weights, clusters: Callable[[], Published] | None = None
    ) -> None:
        """`clusters`: asked at each refresh for what is told of the bandit's."""
        self._config, self._schema = config, Schema.of(config)
        self._ranker, self._clusters = ranker, clusters
        self._towers = Towers(specs.two_tower(config, self._schema), towers)
        self.refresh()

    def refresh(self) -> bool:
        self.current = Networks(
            scores=scoring.scores_of(self._config, self._schema, self._ranker),
            towers=self._towers,
            clusters=self._clusters() if self._clusters else None,
            version=1,
        )
        return True
