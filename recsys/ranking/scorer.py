"""Scoring: features to rows, rows to probabilities and vectors. Answers from known rows when parameter is away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.bandit.graph import Published
from recsys.config import Config
from recsys.features.build import Features, UserFeatures
from recsys.features.schema import Schema
from recsys.model import scoring
from recsys.model.layouts import layouts
from recsys.model.plan import Block, plan, unique_rows
from recsys.model.row_fields import starts
from recsys.model.tower_scoring import Towers
from recsys.parameters.base import Parameters, ParameterState
from recsys.parameters.dense_weights import DenseWeights, NetworkSource
from recsys.parameters.row_source import RowSource
from recsys.ranking.two_stages import NONE, TwoStages
from recsys.types import Bool, Float32, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Probabilities [k, T] of the candidates `kept` [k], and what they were made with: that of this very call."""

    kept: npt.NDArray[np.intp]
    predictions: Float32
    state: ParameterState
    """Rows as of this state."""
    dense_version: int
    available: bool
    """Whether the rows came from the parameter service; else they are the last known ones."""


class Scorer:
    """Networks over looked-up rows. Thread-safe; networks are swapped whole by `refresh`."""

    def __init__(
        self, config: Config, schema: Schema, parameters: Parameters, networks: NetworkSource | None = None
    ) -> None:
        """`networks`: None: those that `parameters` has the weights of."""
        self._config, self._schema = config, schema
        self._rows = RowSource(layouts(config, schema), parameters)
        self.networks: NetworkSource = networks or DenseWeights(config, schema, self._rows)
        self._stages = TwoStages(config)
        self.value = self._stages.value

    @property
    def dense_version(self) -> int:
        """Version of the dense weights in use; 0: untrained."""
        return self.networks.current.version

    def predict(self, batch: Sequence[Features]) -> list[Float32]:
        """Probabilities [K, T] of each request's items, all by the whole network of one version."""
        lay, scores = plan(self._schema, batch), self.networks.current.scores
        deep, wide = self._rows.lookup([lay.deep, lay.wide]).values
        probabilities = scores.predict(lay, deep, scores.light(lay, deep, wide))
        counts = np.cumsum([len(features.item_keys) for features in batch])[:-1]
        return list(np.split(probabilities, counts))

    def rank(self, features: Features, most: int, always: Int64 = NONE) -> Scored:
        """The whole network's probabilities of the `most` items that the wide part values most, `always` among them."""
        lay, networks = plan(self._schema, [features]), self.networks.current
        found = self._rows.lookup([lay.deep, lay.wide])
        kept, predictions = self._stages.score(networks.scores, lay, found.values, most, always)
        return Scored(
            kept=kept,
            predictions=predictions,
            state=found.state,
            dense_version=networks.version,
            available=found.available,
        )

    @property
    def towers(self) -> Towers:
        """The towers in use."""
        return self.networks.current.towers

    @property
    def clusters(self) -> Published | None:
        """What the trainer last told of the bandit's clusters."""
        return self.networks.current.clusters

    def rows(self, block: Block) -> Float32:
        """The values of a block's rows [U, D]; the last known ones when parameter is away."""
        return self._rows.lookup([block]).values[0]

    def user_vector(self, user: UserFeatures, towers: Towers) -> Float32 | None:
        """The user's vector [tower_dim] (of several interests [K, tower_dim]); None before anything is known of them."""
        known = len(user.history_keys) or user.shared_mask[1:].any()
        return self.user_vectors([user], towers)[0] if known else None

    def user_vectors(self, users: Sequence[UserFeatures], towers: Towers) -> Float32:
        """Vectors [n, tower_dim] (or [n, K, tower_dim]) of users of whom something is known."""
        longest = max(1, *(len(user.history_keys) for user in users))
        past_keys = np.zeros((len(users), longest, len(self._schema.history_slots)), np.int64)
        past_mask = np.zeros(past_keys.shape, np.bool_)
        for index, user in enumerate(users):
            past_keys[index, : len(user.history_keys)] = user.history_keys
            past_mask[index, : len(user.history_keys)] = user.history_mask
        mine = np.stack([user.shared_keys for user in users]), np.stack([user.shared_mask for user in users])
        block, (shared, past) = unique_rows(
            [(self._schema.shared_slots, *mine), (self._schema.history_slots, past_keys, past_mask)], "tower"
        )
        rows, dim = self._rows.lookup([block]).values[0], self._config.model.dim
        fields = starts(self._schema.item_fields[: self._schema.num_history_fields])
        seen = scoring.take(rows, shared, np.arange(shared.shape[1] + 1), dim)
        history = scoring.take(rows, past, fields, dim)
        return towers.user_vectors(seen, history, past_mask[..., 0])

    def item_vectors(self, keys: Int64, mask: Bool, towers: Towers, *, required: bool = False) -> Float32:
        """Item tower over item columns [n, I]: vectors [n, tower_dim]. `required`: raises ParametersUnavailable rather than use last
        known rows."""
        block, (items,) = unique_rows([(self._schema.item_slots, keys, mask)], "tower")
        rows = (self._rows.require if required else self._rows.lookup)([block]).values[0]
        fields = scoring.take(rows, items, starts(self._schema.item_fields), self._config.model.dim)
        return towers.item_vectors(fields)

    @property
    def state(self) -> ParameterState:
        """The newest state that is known of."""
        return self._rows.state

    def poll(self) -> None:
        """Ask for the parameters' state without a request. Raises ParametersUnavailable."""
        self._rows.poll()

    def refresh(self) -> bool:
        """Use newer networks, if there are any. Raises ParametersUnavailable, SchemaMismatch."""
        return self.networks.refresh()
