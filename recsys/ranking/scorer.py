"""Scoring: features to rows, rows to tensors, tensors to probabilities. Answers from known rows when parameter is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError

from recsys.bandit.graph import Published
from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.features.build import Features, UserFeatures
from recsys.features.schema import Schema
from recsys.model import networks, scoring
from recsys.model.assemble import ranker_inputs, starts, wide_sums
from recsys.model.layouts import layouts
from recsys.model.plan import Block, Plan, plan, unique_rows
from recsys.model.ranker import Ranker
from recsys.model.scoring import Scoring
from recsys.model.tower_scoring import user_vectors
from recsys.model.two_tower import TwoTower
from recsys.parameters.base import Parameters, ParameterState
from recsys.parameters.row_source import RowSource
from recsys.ranking.value import Value
from recsys.types import Bool, Float32, Int64

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Networks:
    ranker: Ranker
    scoring: Scoring | None
    """The ranker's weights for the kernels; None: they still change, and are taken anew for each request."""
    towers: TwoTower
    dense_version: int
    clusters: Published | None


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
    """Ranker and user tower over looked-up rows. Thread-safe; dense weights are swapped whole by `refresh`."""

    def __init__(self, config: Config, schema: Schema, parameters: Parameters) -> None:
        self._config, self._schema = config, schema
        self._networks = self._build(None, 0)
        self._told: Callable[[], Published] | None = None
        self._rows = RowSource(layouts(config, schema), parameters)
        self._refreshing = threading.Lock()
        self.value = Value(config)

    @property
    def dense_version(self) -> int:
        """Version of the dense weights in use; 0: untrained."""
        return self._networks.dense_version

    def predict(self, batch: Sequence[Features]) -> list[Float32]:
        """Probabilities [K, T] of each request's items, from one forward pass."""
        lay = plan(self._schema, batch)
        deep, wide = map(torch.from_numpy, self._rows.lookup([lay.deep, lay.wide]).values)
        self._networks.ranker.eval()
        with torch.inference_mode():
            inputs = ranker_inputs(self._schema, lay, deep, wide, self._config.model.dim)
            probabilities: Float32 = self._networks.ranker.predict(inputs).numpy()
        counts = np.cumsum([len(f.item_keys) for f in batch])[:-1]
        return list(np.split(probabilities, counts))

    def rank(self, features: Features, most: int, always: Int64 = NONE) -> Scored:
        """The whole network's probabilities of the `most` items that the wide part values most, `always` among them."""
        lay, networks = plan(self._schema, [features]), self._networks
        found = self._rows.lookup([lay.deep, lay.wide])
        deep, wide = found.values
        kept, predictions = self._score(networks, lay, (deep, wide), most, always)
        return Scored(
            kept=kept,
            predictions=predictions,
            state=found.state,
            dense_version=networks.dense_version,
            available=found.available,
        )

    def score_rows(
        self, lay: Plan, rows: tuple[Float32, Float32], most: int, always: Int64 = NONE
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        """As `rank`, of a request laid out whose rows were looked up: deep [U, d + tasks …] and wide [U', tasks]; which items are
        kept [k], and their probabilities [k, T]."""
        return self._score(self._networks, lay, rows, most, always)

    def _score(
        self, networks: _Networks, lay: Plan, rows: tuple[Float32, Float32], most: int, always: Int64
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        kernels = (
            (networks.scoring or scoring.packed(self._schema, networks.ranker)) if scoring.compiled.is_set() else None
        )
        if kernels is None:
            return self._score_by_torch(networks.ranker, lay, rows, most, always)
        kept = np.arange(len(lay.item))
        deep, wide = rows
        light = kernels.light(lay, deep, wide)
        if len(kept) > most:
            kept = self._kept(kernels.probabilities(light), most, always)
            lay, light = lay.keep(kept), light[kept]
        return kept, kernels.predict(lay, deep, light)

    def _kept(self, light: Float32, most: int, always: Int64) -> npt.NDArray[np.intp]:
        """The items that the wide part values most, and `always`."""
        value = self.value(light)
        value[always] = np.inf
        return np.sort(np.argsort(-value, kind="stable")[:most])

    def _score_by_torch(
        self, ranker: Ranker, lay: Plan, found: tuple[Float32, Float32], most: int, always: Int64
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        """The same while the kernels are compiled, and of a network that they do not know."""
        dim, kept = self._config.model.dim, np.arange(len(lay.item))
        rows = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        with torch.inference_mode():
            if len(kept) > most:
                sums = wide_sums(self._schema, lay, *rows, dim)
                light = ranker.probabilities(ranker.wide_logits(torch.from_numpy(lay.numbers), sums)).numpy()
                kept = self._kept(light, most, always)
                lay = lay.keep(kept)
            probabilities: Float32 = ranker.eval().predict(ranker_inputs(self._schema, lay, *rows, dim)).numpy()
        return kept, probabilities

    @property
    def towers(self) -> TwoTower:
        """The towers in use."""
        return self._networks.towers

    @property
    def clusters(self) -> Published | None:
        """What the trainer last told of the bandit's clusters."""
        return self._networks.clusters if self._told is None else self._told()

    def rows(self, block: Block) -> Float32:
        """The values of a block's rows [U, D]; the last known ones when parameter is away."""
        return self._rows.lookup([block]).values[0]

    def user_vector(self, user: UserFeatures, towers: TwoTower) -> Float32 | None:
        """The user's vector [tower_dim] (of several interests [K, tower_dim]); None before anything is known of them."""
        known = len(user.history_keys) or user.shared_mask[1:].any()
        return self.user_vectors([user], towers)[0] if known else None

    def user_vectors(self, users: Sequence[UserFeatures], towers: TwoTower) -> Float32:
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
        return user_vectors(towers, seen, history, past_mask[..., 0])

    def item_vectors(self, keys: Int64, mask: Bool, towers: TwoTower, *, required: bool = False) -> Float32:
        """Item tower over item columns [n, I]: vectors [n, tower_dim]. `required`: raises ParametersUnavailable rather than use last
        known rows."""
        block, (items,) = unique_rows([(self._schema.item_slots, keys, mask)], "tower")
        rows = (self._rows.require if required else self._rows.lookup)([block]).values[0]
        fields = scoring.take(rows, items, starts(self._schema.item_fields), self._config.model.dim)
        with torch.inference_mode():
            vectors: Float32 = towers.item_vectors(torch.from_numpy(fields)).numpy()
        return vectors

    def adopt(self, ranker: Ranker, towers: TwoTower | None, told: Callable[[], Published] | None = None) -> None:
        """Score with these very networks, as they learn, and what is told of clusters: an in-process trainer's, in replay."""
        self._networks = _Networks(ranker, None, towers or self._networks.towers, 1, None)
        self._told = told

    @property
    def state(self) -> ParameterState:
        """The newest state that is known of."""
        return self._rows.state

    def poll(self) -> None:
        """Ask for the parameters' state without a request. Raises ParametersUnavailable."""
        self._rows.poll()

    def refresh(self) -> bool:
        """Fetch and swap newer dense weights, if there are any. Raises ParametersUnavailable, SchemaMismatch."""
        with self._refreshing:
            if self.state.dense_version == self._networks.dense_version:
                return False
            version, payload = self._rows.dense()
            if not payload or version == self._networks.dense_version:
                return False
            self._networks = self._build(payload, version)
            return True

    def _build(self, payload: bytes | None, version: int) -> _Networks:
        ranker, towers = networks.ranker(self._config, self._schema), networks.two_tower(self._config, self._schema)
        clusters: Published | None = None
        if payload is not None:
            try:
                state = safetensors.torch.load(payload)
                ranker.load_state_dict(_part(state, "ranker.model."))
                if self._config.training.two_tower:
                    towers.load_state_dict(_part(state, "towers.model."))
                if told := {name: value.numpy() for name, value in _part(state, "clusters.").items()}:
                    clusters = Published.of(told)
            except (RuntimeError, SafetensorError) as error:
                raise SchemaMismatch(
                    f"dense weights {version} do not fit the configured model ({error}): restart all with one configuration"
                ) from None
        return _Networks(ranker.eval(), scoring.packed(self._schema, ranker), towers.eval(), version, clusters)


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
