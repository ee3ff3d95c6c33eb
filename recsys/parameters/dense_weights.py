"""The networks that score, and where they come from: dense weights that the trainer published, or a learner of this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load

from recsys.bandit.graph import Published
from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.features.schema import Schema
from recsys.model import networks, scoring
from recsys.model.ranker import Ranker
from recsys.model.scoring import Scoring
from recsys.model.two_tower import TwoTower
from recsys.parameters.row_source import RowSource

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Ranker, towers and the bandit's clusters of one version of the dense weights."""

    ranker: Ranker
    scoring: Scoring | None
    """The ranker's weights for the kernels; None: it has a part that they do not know."""
    towers: TwoTower
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
        self.current = self._build(None, 0)
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

    def _build(self, payload: bytes | None, version: int) -> Networks:
        ranker, towers = networks.ranker(self._config, self._schema), networks.two_tower(self._config, self._schema)
        clusters: Published | None = None
        if payload is not None:
            try:
                state = load(payload)
                ranker.load_state_dict(_part(state, "ranker.model."))
                if self._config.training.two_tower:
                    towers.load_state_dict(_part(state, "towers.model."))
                if told := {name: value.numpy() for name, value in _part(state, "clusters.").items()}:
                    clusters = Published.of(told)
            except (RuntimeError, SafetensorError) as error:
                raise SchemaMismatch(
                    f"dense weights {version} do not fit the configured model ({error}): restart all with one configuration"
                ) from None
        packed = scoring.packed(self._schema, ranker)
        return Networks(ranker=ranker.eval(), scoring=packed, towers=towers.eval(), clusters=clusters, version=version)


def _part(state: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
