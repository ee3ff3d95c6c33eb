"""The source `bandit`: a user's clusters, their items, what the edges say of them, and what is logged of it.

Legend: K active clusters, D dimensions, N shown items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys import metrics
from recsys.bandit.graph import NEWEST_SHARE, Graph, Published, Space
from recsys.bandit.score import Edges, Rule, Scores, best, choose, cluster_weights, score, warm_up
from recsys.bandit.served import Served
from recsys.candidates.model_vectors import Vectors
from recsys.candidates.recent_users import Recent, RecentUsers
from recsys.compiled import compiled
from recsys.config import Config
from recsys.decay import ForwardDecay
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.model.plan import Block
from recsys.model.tower_scoring import Towers
from recsys.retrieval.searcher import Searcher
from recsys.retrieval.select import NO_ROWS, may_show
from recsys.types import Bool, Float32, Int32, Int64

RECENT = 2000
"""Requests of late by which clusters find their place in a new generation: half leaves 256 clusters 4 each, double takes
another 4 MB and as many vectors to compute."""
AT_ONCE = 250
"""Their vectors are computed so many at a time, so that no request waits long for the interpreter."""


@dataclass(slots=True)
class Active:
    """What a request's user is to the bandit: their vector and active clusters [K], nearest first; the graph, once there is one."""

    generation: str
    vector: Float32
    graph: Graph | None
    at: Int64
    """Which of the graph's clusters are active [K]."""
    clusters: Int64
    weights: Float32
    fresh: Int64
    """Rows of items with an edge to them of which some edge was never shown; filled by `candidates`."""


class Bandit:
    """Graphs of the generations in use. One thread prepares and refreshes; requests come from any."""

    def __init__(self, config: Config, catalogue: Catalogue, vectors: Vectors) -> None:
        self._config, self._catalogue, self._model = config.bandit, catalogue, vectors
        self._newest = int(config.bandit.neighbours * NEWEST_SHARE) * config.bandit.clusters
        bandit = config.bandit
        self._rule = Rule(not bandit.normalised, bandit.fresh_above, bandit.prior)
        self._spaces: dict[str, Space] = {}
        self._published: Published | None = None
        self.recent = RecentUsers(RECENT)

    def prepare(self, name: str, searcher: Searcher, towers: Towers, changed: Sequence[int] = ()) -> None:
        """Find the clusters' places and items in a generation that is about to be used; the one before stays for requests under way.

        `changed`: rows that are new in it.
        """
        warm_up()  # not in the first request
        self._edges(np.zeros((0, 1), np.int32), NO_ROWS, None)
        space = Space(searcher.search, self._config.neighbours, self._own_centroids(towers))
        older = list(self._spaces.values())[-1:]
        rows = np.concatenate([*(space.newest for space in older), np.array(changed, np.int32)])[-self._newest :]
        self._arrive(space, rows[self._catalogue.alive[rows]], towers)
        published = self._model.clusters
        if published is not None:
            space.follow(published, name)
        for one in older:
            one.retire()
        self._spaces = {**dict(list(self._spaces.items())[-1:]), name: space}
        # `forget_rows` did not know the space until now. The caller reads, so that no row is another item's yet.
        space.forget_rows(np.flatnonzero(~self._catalogue.alive).astype(np.int32))

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': nothing is kept by them. Called by the catalogue's writer."""
        for space in list(self._spaces.values()):
            space.forget_rows(rows)

    def _own_centroids(self, towers: Towers) -> dict[int, Float32]:
        """Each cluster's mean of its users of late, as these towers see them."""
        recent = list(self.recent)
        sums: dict[int, Float32] = {}
        for start in range(0, len(recent), AT_ONCE):
            part = recent[start : start + AT_ONCE]
            vectors = self._model.user_vectors([one.user for one in part], towers)
            for one, vector in zip(part, map(_of_interests, vectors), strict=True):
                if np.isfinite(vector).all():
                    sums[one.cluster] = sums.get(one.cluster, np.float32(0)) + vector
        norms = {cluster: float(np.linalg.norm(vector)) for cluster, vector in sums.items()}
        return {cluster: vector / np.float32(norms[cluster]) for cluster, vector in sums.items() if norms[cluster] > 0}

    def arrived(self, name: str, rows: Sequence[int], towers: Towers) -> None:
        """Items are new, or changed: they get their edges with the next `refresh`."""
        if rows and name in self._spaces:
            self._arrive(self._spaces[name], np.array(rows, np.int32)[-self._newest :], towers)
            self._published = None

    def _arrive(self, space: Space, rows: Int32, towers: Towers) -> None:
        if not len(rows):
            return
        vectors = self._model.item_vectors(self._catalogue.keys[rows], self._catalogue.mask[rows], towers)
        known = np.isfinite(vectors).all(1) & vectors.any(1)
        space.arrive(rows[known], vectors[known], self._newest)

    def refresh(self) -> None:
        """Follow what the trainer tells of its clusters, and the items that arrived."""
        published = self._model.clusters
        if published is None or published is self._published:
            return
        for name, space in list(self._spaces.items())[-1:]:
            space.follow(published, name)
        self._published = published

    def activate(self, name: str, user: UserFeatures, vector: Float32) -> Active | None:
        """The clusters nearest to a user's vector [D] (of several interests [I, D]: to their mean's direction) in a generation; before any has
        a centroid, the first one. None: there is none."""
        vector = _of_interests(vector)
        space = self._spaces.get(name)
        graph = space.graph if space else None
        published = graph.published if graph else self._model.clusters
        if published is None or not np.isfinite(vector).all() or not vector.any():
            return None
        nothing, at = np.zeros(0, np.int64), np.zeros(0, np.int64)
        clusters, weights = published.ids[:1], np.ones(1, np.float32)
        if graph is not None and len(graph.ids):
            at, weights = cluster_weights(vector, graph.centroids, self._config.active, self._config.temperature)
            clusters = graph.ids[at]
        self.recent.extend((Recent(user, int(clusters[0])),))
        return Active(name, vector, graph, at, clusters, weights, nothing)

    def forget(self, user_key: int) -> None:
        """Drop what is kept of a user."""
        self.recent.forget(user_key)

    def candidates(
        self, active: Active, quota: int, request_id: str, now_ms: int, left_out: Int32, allowed: Bool | None
    ) -> tuple[Int32, Float32]:
        """The `quota` best items with an edge to an active cluster, best first, and scores that fall with their rank."""
        if active.graph is None or not len(active.at):
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        cluster, rows = self._edges(active.graph.rows[active.at], left_out, allowed)
        places = active.graph.places[active.at][cluster]
        d, n, b = self._model.rows(Block(layout="edge", slots=places, keys=self._catalogue.keys[rows, 0])).T.copy()
        scale = self._decayed(active.graph.published, now_ms)
        scores = score(active.weights, Edges(cluster, rows, d, n, b, scale), self._rule)
        chosen = self._choose(scores, quota, request_id)
        active.fresh = scores.items[scores.fresh]
        return scores.items[chosen].astype(np.int32), np.arange(len(chosen), 0, -1, dtype=np.float32)

    def _edges(self, rows: Int32, left_out: Int32, allowed: Bool | None) -> tuple[Int64, Int64]:
        """Which of the clusters and which item, for each edge among rows [K, W + G] that may be shown."""
        cluster, found = np.empty((2, rows.size), np.int64)
        count = _showable(rows, self._catalogue.alive if allowed is None else allowed, left_out, cluster, found)
        return cluster[:count], found[:count]

    def _decayed(self, published: Published, now_ms: int) -> float:
        told = published.half_life_s
        half_life_s = self._config.half_life_s if told is None else told
        if not half_life_s:
            return 1.0
        decay = ForwardDecay(half_life_s)
        decay.restore(published.clock)
        return decay.decay(now_ms)

    def _choose(self, scores: Scores, quota: int, request_id: str) -> Int64:
        """The rows of the chosen scores, best first; what is random is seeded by the request."""
        digest = hashlib.blake2b(request_id.encode(), digest_size=8, person=b"bandit").digest()
        rng, bandit = np.random.default_rng(int.from_bytes(digest, "little")), self._config
        if bandit.policy != "epsilon_greedy":
            return choose(scores, quota, bandit.alpha, rng, sampled=bandit.policy == "thompson")
        order = best(scores.mean, len(scores.mean), rng)
        drawn = rng.random(len(order)) < bandit.epsilon * (np.arange(len(order)) < quota)
        order[:quota][drawn[:quota]] = rng.permutation(order[quota:])[: drawn[:quota].sum()]
        return order[:quota]

    def served(self, active: Active, shown: Int32) -> bytes:
        """What an impression of the items at rows `shown` [N] says of the bandit."""
        edges = np.zeros(len(shown), np.uint64)
        if active.graph is not None and len(active.at):
            rows = active.graph.rows[active.at]
            has = (rows[None] == shown[:, None, None]).any(2)
            known, fresh = has.any(1), np.isin(shown, active.fresh)
            metrics.BANDIT_SHOWN.labels("fresh").inc(int((known & fresh).sum()))
            metrics.BANDIT_SHOWN.labels("known").inc(int((known & ~fresh).sum()))
            edges = (has.astype(np.uint64) << np.arange(len(active.at), dtype=np.uint64)).sum(1, dtype=np.uint64)
        return Served(
            generation=active.generation,
            clusters=active.clusters,
            weights=active.weights,
            vector=active.vector,
            edges=edges,
        ).encode()


@compiled
def _showable(rows: Any, allowed: Any, left_out: Any, cluster: Any, found: Any) -> int:
    """Fill which of rows [K, W + G] are allowed and not left out; how many."""
    count = 0
    for k in range(len(rows)):
        for row in rows[k]:
            if may_show(row, allowed, left_out):
                cluster[count], found[count] = k, row
                count += 1
    return count


def _of_interests(vector: Float32) -> Float32:
    """One unit vector [D] for a user: the direction of the mean of several interests; 0 where they cancel out."""
    if vector.ndim == 1:
        return vector
    mean: Float32 = vector.mean(0)
    length = np.linalg.norm(mean)
    return mean / length if length > 0 else mean
