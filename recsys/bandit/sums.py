"""Edge sums in flat arrays, forgotten by forward decay."""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.bandit.score import Edges
from recsys.compiled import compiled
from recsys.decay import ForwardDecay
from recsys.types import Float32, Int64

_MAX_EXPONENT = 40
"""Half-lives until stored sums are rescaled: float32 has 127, of which squares of small weights take 40."""


@compiled
def _add(sums: Any, edges: Any, weights: Any, impressions: Any, rewards: Any, decays: Any) -> None:
    for event in range(len(edges)):
        for k in range(edges.shape[1]):
            edge, weight = edges[event, k], np.float64(weights[event, k])
            if edge < 0 or weight == 0.0:
                continue
            amount = weight * decays[event]
            sums[0, edge] += amount * weight * impressions[event]
            sums[1, edge] += amount * impressions[event]
            sums[2, edge] += amount * rewards[event]


class EdgeSums:
    """d, n and b of each edge. Adding is commutative and associative but for rounding (float64 sums of float32 weights).

    `half_life_s` None: nothing is forgotten. Not thread-safe.
    """

    def __init__(self, num_edges: int, half_life_s: float | None = None) -> None:
        self._sums = np.zeros((3, num_edges))
        self._decay = None if half_life_s is None else ForwardDecay(half_life_s, _MAX_EXPONENT)

    def add(self, edges: Int64, weights: Float32, impressions: Float32, rewards: Float32, times_ms: Int64) -> None:
        """Add N events: places [N, K] (-1: no edge), weights as served [N, K], impressions, rewards and times [N]."""
        if self._decay is None:
            decays = np.ones(len(edges))
        else:
            factor = self._decay.rescale(int(times_ms.max(initial=0))) if len(edges) else None
            if factor is not None:
                self._sums *= factor
            decays = np.array([self._decay.weight(t) for t in times_ms.tolist()])
        _add(self._sums, edges, weights, impressions, rewards, decays)

    def forget(self, edges: Int64) -> None:
        """Begin anew: the edges now belong to other items."""
        self._sums[:, edges] = 0.0

    def at(self, cluster: Int64, item: Int64, edges: Int64, now_ms: int) -> Edges:
        """The edges at these places [E], for `score`."""
        d, n, b = self._sums[:, edges].astype(np.float32)
        scale = 1.0 if self._decay is None else self._decay.decay(now_ms) or 1.0
        return Edges(cluster, item, d, n, b, scale)
