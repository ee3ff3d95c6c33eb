"""A generated stream of requests for bandits: users in overlapping clusters, items that come, go and drift, best answers known.

Legend: B requests, K active clusters, C clusters, J items that ever live, W edges of a cluster, M candidates, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.base import Events, Requests
from recsys.bandit.score import cluster_weights
from recsys.types import Float32, Int64

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BanditWorldOptions:
    """Sizes and times of the world."""

    clusters: int = 256
    active: int = 10
    temperature: float = 0.1
    """Of the softmax over active clusters."""
    edges: int = 100
    """Nearest living items of each cluster."""
    living: int = 600
    arrival_s: float = 30.0
    """A new item comes this often, and the oldest goes."""
    duration_s: int = 7200
    rate: int = 10
    """Requests a second."""
    dim: int = 16
    interests: int = 40
    """Centres of users and items, popular by Zipf's law."""
    bias: float = -4.0
    taste: float = 2.5
    """Logit of a user that points just where the item does, over `bias`."""
    quality: float = 1.0
    """Standard deviation of what no vector knows about an item."""
    drift_half_life_s: float = 7200.0
    """After which half of the quality's variance is new."""
    hidden: int = 32


class BanditWorld:
    """A click has the logit bias + taste ⟨user, item⟩ + quality(item, time): nobody could do better than `truth`.

    The graph is made of vectors that know the item's place but for noise, and know nothing of its quality. `step` goes on
    by one second. Everything follows from the seed; what policies choose changes nothing but the clicks they see.
    """

    def __init__(self, seed: int = 0, options: BanditWorldOptions | None = None) -> None:
        self.options = o = options or BanditWorldOptions()
        self._rng = rng = np.random.default_rng(seed)
        self._centres = _unit(rng.normal(size=(o.interests, o.dim)))
        popularity = 1.0 / np.arange(1, o.interests + 1)
        self._popularity = popularity / popularity.sum()
        self.num_items = o.living + int(o.duration_s / o.arrival_s)
        self.num_edges = o.clusters * self.num_items
        self._items = self._near(rng.integers(o.interests, size=self.num_items), 0.7)
        self._known = _unit(self._items + 0.05 * rng.normal(size=self._items.shape)).astype(np.float32)
        self._quality = rng.normal(0, o.quality, self.num_items)
        self.centroids = self._near(rng.choice(o.interests, o.clusters, p=self._popularity), 0.5).astype(np.float32)
        self._nearness = self.centroids @ self._known.T
        inputs = 2 * o.dim
        self._network = rng.normal(0, np.sqrt(2 / inputs), (inputs, o.hidden)).astype(np.float32) * np.sqrt(o.dim)
        self.now_s = 0
        self.oldest = 0
        """Items live from `oldest` to `oldest + living`."""
        self._connect()

    def _near(self, centres: Int64, spread: float) -> Float64:
        noise = self._rng.normal(size=(len(centres), self.options.dim)) * spread / np.sqrt(self.options.dim)
        return _unit(self._centres[centres] + noise)

    def _connect(self) -> None:
        """The nearest living items of each cluster [C, W], and which edges there are [C, J]."""
        living = self._nearness[:, self.oldest : self.oldest + self.options.living]
        nearest = np.argpartition(-living, self.options.edges, axis=1)[:, : self.options.edges]
        self._members = (nearest + self.oldest).astype(np.int64)
        self._edge = np.zeros(self._nearness.shape, np.bool_)
        np.put_along_axis(self._edge, self._members, True, axis=1)

    def step(self) -> tuple[Requests, Float64]:
        """One second on: its requests and the true probability of a click on each candidate [M]."""
        o, rng = self.options, self._rng
        self.now_s += 1
        keep = 0.5 ** (1.0 / (2 * o.drift_half_life_s))
        self._quality = keep * self._quality + rng.normal(0, o.quality * np.sqrt(1 - keep**2), self.num_items)
        oldest = min(int(self.now_s / o.arrival_s), self.num_items - o.living)
        if oldest != self.oldest:
            self.oldest = oldest
            self._connect()
        users = self._near(rng.choice(o.interests, o.rate, p=self._popularity), 0.7).astype(np.float32)
        requests, of = self._requests(users)
        logits = o.bias + o.taste * (users[of] * self._items[requests.items]).sum(1) + self._quality[requests.items]
        return requests, 1 / (1 + np.exp(-logits))

    def _requests(self, users: Float32) -> tuple[Requests, Int64]:
        o, num = self.options, len(users)
        clusters, weights = np.zeros((num, o.active), np.int64), np.zeros((num, o.active), np.float32)
        for row, user in enumerate(users):
            nearest, shares = cluster_weights(user, self.centroids, o.active, o.temperature)
            clusters[row, : len(nearest)], weights[row, : len(nearest)] = nearest, shares
        found = self._members[clusters]
        keys = (np.arange(num)[:, None, None] * self.num_items + found).ravel()
        candidates, candidate = np.unique(keys, return_inverse=True)
        of, items = np.divmod(candidates, self.num_items)
        requests = Requests(
            now_ms=self.now_s * 1000,
            clusters=clusters,
            weights=weights,
            starts=np.searchsorted(of, np.arange(num + 1)).astype(np.int64),
            items=items,
            candidate=candidate.astype(np.int32),
            column=np.repeat(np.arange(num * o.active, dtype=np.int32), o.edges),
            edge=(clusters[:, :, None] * self.num_items + found).ravel().astype(np.int32),
            hidden=self._hidden(users[of], self._known[items]),
        )
        return requests, of

    def _hidden(self, users: Float32, items: Float32) -> Float32:
        """A fixed network over the vectors that a ranker could know [M, H]."""
        hidden: Float32 = np.maximum(np.concatenate([users * items, items], 1) @ self._network, 0)
        return hidden

    def edges_of(self, clusters: Int64, items: Int64) -> Int64:
        """Places [N, K] of the items' edges with their requests' clusters [N, K]; -1 where there is none."""
        return np.where(self._edge[clusters, items[:, None]], clusters * self.num_items + items[:, None], -1)

    def events(self, requests: Requests, drawn: Int64, rewards: Any) -> Events:
        """What each request's drawn candidate [B] earned [B], as events: shown, and rewarded at once."""
        items = requests.items[drawn]
        return Events(
            clusters=requests.clusters,
            weights=requests.weights,
            items=items,
            edges=self.edges_of(requests.clusters, items),
            impressions=np.ones(len(items), np.float32),
            rewards=np.asarray(rewards, np.float32),
            times_ms=np.full(len(items), requests.now_ms, np.int64),
            hidden=None if requests.hidden is None else requests.hidden[drawn],
        )


def _unit(vectors: Any) -> Float64:
    unit: Float64 = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit
