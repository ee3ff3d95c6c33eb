"""Clusters of users: online spherical k-means on logged user vectors, from one cluster to many.

A vector moves the centroid nearest to it. Clusters have ids that are never used again, and places (slots of the edge table)
that are, once a dropped cluster's edges are gone. Everything is decided by the vectors in their order.
Legend: C clusters, D dimensions, M vectors remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.types import Float32, Int64

EVERY = 64
"""Vectors between two looks at whether to split or drop: half grows twice as fast, from worse known directions."""
REMEMBERED = 2048
"""Newest vectors, by which a cluster is split: half leaves the largest of 256 clusters with 15 of them."""
FULL = 100
"""Vectors that a centroid is a mean of, the newest ones weighing most; half follows drift faster and is noisier."""
SPLIT_MASS = 100.0
"""Of at least so many recent vectors a cluster is split: half makes clusters that know nothing, double takes twice as long."""
DROP_MASS = 5.0
"""Of fewer recent vectors a cluster is dropped. Recent: mass halves every `FULL` vectors for each cluster there may be."""
MEMBERS = 16
"""Remembered vectors that a split needs: fewer have no direction worth the name."""
OLD_SPACES = 16
"""Earlier generations whose late vectors are known as such: processes that answer at once, times their generations on the way."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Split:
    """The child takes over half of the parent: by place."""

    parent: int
    child: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The cluster at a place is gone, and its edges with it."""

    place: int


class Clusters:
    """At most `limit` clusters of vectors of `dim`. Not thread-safe."""

    def __init__(self, dim: int, limit: int) -> None:
        self._limit, self._half_life = limit, FULL * limit
        self.ids = np.zeros(1, np.int64)
        self.places = np.zeros(1, np.int32)
        self._next = 1
        self._sums = np.zeros((1, dim))
        self._weights = np.zeros(1)
        """What each sum's vectors weigh together in this generation; 0: no centroid is known."""
        self._mass = np.zeros(1)
        self._ring = np.zeros((REMEMBERED, dim), np.float32)
        """The newest vectors of this generation [M, D], a ring."""
        self._count = 0
        self._since = 0
        self.generation = ""
        self._older: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _remembered(self) -> Float32:
        return self._ring[: self._count]

    def centroids(self) -> Float32:
        """Unit vectors [C, D]; 0 where none is known in this generation."""
        return _unit(self._sums).astype(np.float32)

    def weights(self) -> Float32:
        """How many vectors each centroid is a mean of, the newest ones counting most [C]."""
        return self._weights.astype(np.float32)

    def add(self, vector: Float32, generation: str, logged: Int64) -> None:
        """Learn one user vector [D] of a generation whose active clusters, nearest first, were `logged`.

        A new generation is a new space: each centroid is learned anew from vectors by their logged cluster, until it has some;
        then the nearest counts. Vectors of an older generation say nothing.
        """
        if generation != self.generation and not self._begin(generation):
            return
        unit = _unit(vector[None].astype(np.float64))[0]
        if not unit.any():
            return
        at = self._nearest(unit, logged)
        if at < 0:
            return
        self._sums[at] = self._sums[at] * (1 - 1 / FULL) + unit
        self._weights[at] = self._weights[at] * (1 - 1 / FULL) + 1
        self._mass[at] += 1
        self._ring[self._count % REMEMBERED] = unit
        self._count += 1
        self._since += 1

    def _begin(self, generation: str) -> bool:
        """Go over to a generation; False for one that is over."""
        if generation in self._older:
            return False
        if self.generation:
            self._older = [*self._older, self.generation][-OLD_SPACES:]
        self.generation = generation
        self._sums[:], self._weights[:] = 0, 0
        self._count = 0
        return True

    def _nearest(self, unit: Float64, logged: Int64) -> int:
        """The cluster that a vector is a member of; -1: none that is known."""
        known, ids = self._weights > 0, self.ids.tolist()
        first = next((ids.index(cluster) for cluster in logged.tolist() if cluster in ids), -1)
        if (first >= 0 and not known[first]) or not known.any():
            return first
        lengths = np.sqrt(np.einsum("cd,cd->c", self._sums, self._sums))
        return int(np.argmax(np.where(known, self._sums @ unit / np.where(lengths > 0, lengths, 1), -np.inf)))

    def step(self) -> list[Split | Drop]:
        """Every `EVERY` vectors: drop the cluster that few users are left in, split the largest. What happened, in order."""
        if self._since < EVERY:
            return []
        self._mass *= 0.5 ** (self._since / self._half_life)
        self._since = 0
        changes: list[Split | Drop] = []
        least = int(np.argmin(self._mass))
        if len(self) > 1 and self._mass[least] < DROP_MASS:
            changes.append(Drop(int(self.places[least])))
            self._keep(np.delete(np.arange(len(self)), least))
        if len(self) < self._limit and (split := self._split()):
            changes.append(split)
        return changes

    def _keep(self, chosen: npt.NDArray[np.int64]) -> None:
        for name in ("ids", "places", "_sums", "_weights", "_mass"):
            setattr(self, name, getattr(self, name)[chosen])

    def _split(self) -> Split | None:
        """Split the largest cluster that can be, at the median of its members' principal direction."""
        large = [int(at) for at in np.argsort(-self._mass, kind="stable")[:3] if self._mass[at] >= SPLIT_MASS]
        if not large:
            return None
        scores = self._remembered @ self.centroids().T
        member = np.argmax(np.where(self._weights > 0, scores, -np.inf), 1)
        for at in large:
            halves = _halves(self._remembered[member == at])
            if halves is not None:
                return self._divide(at, halves)
        return None

    def _divide(self, at: int, halves: tuple[Float64, Float64]) -> Split:
        place = min(set(range(self._limit)) - set(self.places.tolist()))
        self._keep(np.append(np.arange(len(self)), at))
        self.ids[-1], self.places[-1] = self._next, place
        self._next += 1
        for index, mean in zip((at, -1), halves, strict=True):
            self._weights[index] /= 2
            self._mass[index] /= 2
            self._sums[index] = mean * self._weights[index]
        return Split(int(self.places[at]), place)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything, as arrays."""
        names = "\n".join([self.generation, *self._older]).encode()
        return {
            "ids": self.ids.copy(),
            "places": self.places.copy(),
            "sums": self._sums.copy(),
            "weights": self._weights.copy(),
            "mass": self._mass.copy(),
            "remembered": self._remembered.copy(),
            "counts": np.array([self._next, self._count, self._since]),
            "generations": np.frombuffer(names, np.uint8).copy(),
        }

    def restore(self, state: dict[str, npt.NDArray[np.generic]]) -> None:
        """Load what `state` returned."""
        self.ids, self.places = np.array(state["ids"], np.int64), np.array(state["places"], np.int32)
        self._sums, self._weights = np.array(state["sums"]), np.array(state["weights"])
        self._mass, remembered = np.array(state["mass"]), state["remembered"]
        self._ring[: len(remembered)] = remembered
        self._next, self._count, self._since = (int(v) for v in np.asarray(state["counts"], np.int64))
        self.generation, *self._older = bytes(state["generations"]).decode().split("\n")


def _halves(members: Float32) -> tuple[Float64, Float64] | None:
    """Mean directions of the members [m, D] on either side of the median of their principal direction; None: too few, or all alike."""
    if len(members) < MEMBERS:
        return None
    exact = members.astype(np.float64)
    spread = exact - exact.mean(0)
    values, vectors = np.linalg.eigh(spread.T @ spread)
    if values[-1] < 1e-6 * len(members):
        return None
    along = spread @ vectors[:, -1]
    upper = np.zeros(len(along), np.bool_)
    upper[np.argsort(along, kind="stable")[len(along) // 2 :]] = True
    one, other = exact[upper].mean(0), exact[~upper].mean(0)
    return (one, other) if one.any() and other.any() else None


def _unit(vectors: Float64) -> Float64:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Float64 = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return result
