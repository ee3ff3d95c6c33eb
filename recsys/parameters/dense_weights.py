"""The networks that score, and where they come from: dense weights that the trainer published, or a learner of this process."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

from safetensors import SafetensorError

from recsys.bandit.graph import Published
from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.features.schema import Schema
from recsys.model import scoring, specs, weights
from recsys.model.scoring import Scores
from recsys.model.tower_scoring import Towers
from recsys.model.weights import Weights, part
from recsys.parameters.row_source import RowSource

logger = logging.getLogger("recsys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Ranker, towers and the bandit's clusters of one version of the dense weights."""

    scores: Scores
    """By the ranker's weights"""
    towers: Towers
    clusters: Published | None = None
    """What the trainer last told of them; None: nothing yet."""
    version: int
    """0: untrained."""


class NetworkSource(Protocol):
    """Where a scorer gets its networks from. Thread-safe."""

    @property
    def current(self) -> Networks:
        """Those in use, whole: a newer version is another value."""
        ...

    def refresh(self) -> bool:
        """Take newer ones, if there are any. Raises ParametersUnavailable, SchemaMismatch."""
        ...


class DenseWeights:
    """Networks from what the trainer published, fetched by way of the rows' source; untrained ones before."""

    def __init__(self, config: Config, schema: Schema, rows: RowSource) -> None:
        self._config, self._schema, self._rows = config, schema, rows
        if lacking := scoring.lacking(config):
            logger.warning("requests are scored by torch, slower: the kernels have no %s", lacking)
        self.current = self._untrained()
        self._refreshing = threading.Lock()

    def refresh(self) -> bool:
        """Fetch newer weights where the rows' state names another version."""
        with self._refreshing:
            if self._rows.state.dense_version == self.current.version:
                return False
            version, payload = self._rows.dense()
            if not payload or version == self.current.version:
                return False
            self.load(payload, version)
            return True

    def load(self, payload: bytes, version: int) -> None:
        """Use these weights from now on. Raises SchemaMismatch where they are another network's."""
        self.current = self._build(payload, version)

    def _untrained(self) -> Networks:
        spec = specs.two_tower(self._config, self._schema)
        towers = Towers(spec, weights.of_towers(spec, seed=self._config.seed))
        return Networks(scores=scoring.scores_of(self._config, self._schema, None), towers=towers, version=0)

    def _build(self, payload: bytes, version: int) -> Networks:
        towers = self.current.towers
        try:
            given = weights.read(payload)
            ranker = scoring.checked(self._config, self._schema, part(given, "ranker.model."))
            scores = scoring.scores_of(self._config, self._schema, ranker)
            if self._config.training.two_tower:
                towers = Towers(towers.spec, weights.fitted(part(given, "towers.model."), towers.weights))
            clusters = self._clusters(part(given, "clusters."))
        except (SafetensorError, SchemaMismatch) as error:
            raise SchemaMismatch(
                f"dense weights {version} do not fit the configured model ({error}): restart all with one configuration"
            ) from None
        return Networks(scores=scores, towers=towers, clusters=clusters, version=version)

    def _clusters(self, told: Weights) -> Published | None:
        """What a trainer told of the bandit's; nobody asks for them where nothing explores."""
        if not told or not self._config.explores:
            return None
        clusters = Published.of(told)
        width, places = self._config.model.tower_dim, range(self._config.bandit.clusters)
        if clusters.centroids.shape[1] != width or not set(clusters.places.tolist()) <= set(places):
            raise SchemaMismatch(f"the bandit's clusters are not in {width} dimensions and {len(places)} places")
        return clusters
