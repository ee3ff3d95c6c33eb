"""The graph of clusters and items, in which alone the bandit explores: each cluster's nearest items, and the newest ones.

A graph is of one generation and never changes: the next one takes its place. Legend: C clusters, D dimensions, W nearest
items of a cluster, G newest ones, E edges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.clusters import MEMBERS
from recsys.errors import SchemaMismatch
from recsys.types import Float32, Int32, Int64

Search = Callable[[Float32, int], tuple[Int32, Float32]]
"""The k rows nearest to a vector, best first, and their cosines."""
MOVED = 0.995
"""A cluster's nearest items are looked for again once its centroid's cosine to what they were found by is below this: .98 leaves
a fifth of them stale, .999 searches all the time."""
NEWEST_SHARE = 0.25
"""Newest items of a cluster for each nearest one: double halves the time an item stays one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the trainer tells of its clusters: ids, places [C], centroids [C, D] of a generation (0: not known), how many vectors
    each is a mean of [C], and the edges' forward decay."""

    ids: Int64
    places: Int32
    centroids: Float32
    weights: Float32
    generation: str
    clock: tuple[int, ...]
    half_life_s: float | None
    """Of the edges' sums; 0: they do not decay; None: an earlier version did not say."""

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Published:
        """From `BanditLearner.published`. SchemaMismatch where it cannot have told this."""
        centroids, half_life_s = arrays.get("centroids", np.zeros(0)), arrays.get("half_life_s", np.zeros(1))
        count, width = centroids.shape if centroids.ndim == 2 else (0, 0)
        shapes = {"ids": (count,), "places": (count,), "centroids": (count, width), "weights": (count,)}
        kinds = {"ids": np.int64, "places": np.int32, "centroids": np.float32, "weights": np.float32}
        for name, kind in (kinds | {"generation": np.uint8, "decay": np.int64}).items():
            found = arrays.get(name)
            if found is None or found.dtype != kind or found.shape != shapes.get(name, found.shape[:1]):
                raise SchemaMismatch(f"{name!r} of the bandit's clusters is not what a trainer tells")
        if not count or len(arrays["decay"]) not in (2, 3):
            raise SchemaMismatch("the bandit's clusters are none, or their decay is not what a trainer tells")
        if half_life_s.shape != (1,) or not 0 <= half_life_s[0] < np.inf:
            raise SchemaMismatch("the half-life of the bandit's edges is not what a trainer tells")
        return cls(
            **{name: arrays[name] for name in shapes},
            generation=arrays["generation"].tobytes().decode(errors="replace"),
            clock=tuple(arrays["decay"].tolist()),
            half_life_s=float(half_life_s[0]) if "half_life_s" in arrays else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Clusters with a centroid, and the rows of the items that have an edge to each [C, W + G]; -1: none."""

    published: Published
    ids: Int64
    places: Int32
    centroids: Float32
    rows: Int32


def _forgotten(centroid: Float32, k: int) -> tuple[Int32, Float32]:
    raise RuntimeError("a retired generation is not searched")


@dataclass(frozen=True, slots=True)
class _Near:
    """A cluster's nearest items, by which centroid they were found, and the least cosine among them (-1: there is room)."""

    centroid: Float32
    rows: Int32
    floor: float


class Space:
    """The graph of one generation, kept up with the clusters and the newest items. Any thread may read `graph`; changes exclude each
    other."""

    def __init__(self, search: Search, neighbours: int, own: Mapping[int, Float32]) -> None:
        """`own`: what is known of clusters' centroids before the trainer knows them in this generation."""
        self._search, self._size, self._own = search, neighbours, dict(own)
        self._newest = int(neighbours * NEWEST_SHARE)
        self._near: dict[int, _Near] = {}
        self._rows, self._vectors = np.zeros(0, np.int32), np.zeros((0, 0), np.float32)
        self.graph: Graph | None = None
        self._lock = threading.Lock()

    @property
    def newest(self) -> Int32:
        """Rows of the items that arrived last."""
        return self._rows

    def arrive(self, rows: Int32, vectors: Float32, limit: int) -> None:
        """Items came or changed: rows [n], unit vectors [n, D]. Of all, the newest `limit` are kept."""
        if not len(rows):
            return
        with self._lock:
            kept = ~np.isin(self._rows, rows)
            self._vectors = np.concatenate([self._vectors.reshape(-1, vectors.shape[1])[kept], vectors])[-limit:]
            self._rows = np.concatenate([self._rows[kept], rows])[-limit:]

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': no cluster has an edge to them."""
        with self._lock:
            kept = ~np.isin(self._rows, rows)
            self._rows, self._vectors = self._rows[kept], self._vectors[kept] if len(kept) else self._vectors
            for cluster, near in list(self._near.items()):
                if (here := ~np.isin(near.rows, rows)).sum() < len(here):
                    self._near[cluster] = replace(near, rows=near.rows[here])
            if (graph := self.graph) is not None:
                self.graph = replace(graph, rows=np.where(np.isin(graph.rows, rows), np.int32(-1), graph.rows))

    def follow(self, published: Published, generation: str) -> None:
        """Make the next graph; clusters that hardly moved keep their nearest items."""
        with self._lock:
            self.graph = self._next(published, generation)

    def _next(self, published: Published, generation: str) -> Graph:
        centroids = self._centroids(published, generation)
        known = np.flatnonzero(centroids.any(1))
        ids, centroids = published.ids[known], centroids[known]
        near = {cluster: self._nearest(cluster, at) for cluster, at in zip(ids.tolist(), centroids, strict=True)}
        self._near = near
        rows = np.full((len(ids), self._size + self._newest), -1, np.int32)
        for index, cluster in enumerate(ids.tolist()):
            rows[index, : len(near[cluster].rows)] = near[cluster].rows
        if len(self._rows) and len(ids):
            self._add_newest(rows, centroids, np.array([near[cluster].floor for cluster in ids.tolist()]))
        return Graph(published=published, ids=ids, places=published.places[known], centroids=centroids, rows=rows)

    def retire(self) -> None:
        """A newer generation is in use: the graph stays for requests under way, the index goes."""
        self._search = _forgotten

    def _centroids(self, published: Published, generation: str) -> Float32:
        """The trainer's, of this generation and of enough vectors; else our own; else what there is."""
        same = published.generation == generation
        centroids = published.centroids.copy() if same else np.zeros_like(published.centroids)
        for index, cluster in enumerate(published.ids.tolist()):
            if cluster in self._own and not (same and published.weights[index] >= MEMBERS):
                centroids[index] = self._own[cluster]
        return centroids

    def _nearest(self, cluster: int, centroid: Float32) -> _Near:
        before = self._near.get(cluster)
        if before is not None and float(before.centroid @ centroid) >= MOVED:
            return before
        rows, cosines = self._search(centroid, self._size)
        return _Near(centroid, rows, float(cosines[-1]) if len(rows) == self._size else -1.0)

    def _add_newest(self, rows: Int32, centroids: Float32, floors: npt.NDArray[np.float64]) -> None:
        """Each new item has an edge to the cluster nearest to it, and to all that it is among the nearest items of."""
        cosines = self._vectors @ centroids.T
        joins = cosines > floors
        joins[np.arange(len(cosines)), cosines.argmax(1)] = True
        for cluster in np.flatnonzero(joins.any(0)).tolist():
            new = self._rows[joins[:, cluster]]
            new = new[~np.isin(new, rows[cluster, : self._size])][-self._newest :]
            rows[cluster, self._size : self._size + len(new)] = new
