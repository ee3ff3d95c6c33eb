"""Edge sums in flat arrays, forgotten by forward decay."""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.compiled import compiled
from recsys.decay import ForwardDecay
from recsys.types import Float32, Int64


@compiled
def _add(sums: Any, edges: Any, weights: Any, impressions: Any, rewards: Any, decays: Any) -> None:
    for event in range(len(edges)):
        for k in range(edges.shape[1]):
            edge, weight = edges[event, k], np.float64(weights[event, k])
            if edge < 0 or weight == 0.0:
                continue
            amount = weight * decays[event]
            sums[edge, 0] += amount * weight * impressions[event]
            sums[edge, 1] += amount * impressions[event]
            sums[edge, 2] += amount * rewards[event]


class EdgeSums:
    """d, n and b of each edge. Adding is commutative and associative but for rounding (float64 sums of float32 weights).

    `half_life_s` None: nothing is forgotten. Not thread-safe.
    """

    def __init__(self, num_edges: int, half_life_s: float | None = None) -> None:
        self.sums = np.zeros((num_edges, 3))
        """d, n, b of each edge, to be multiplied by `scale`."""
        self._decay = None if half_life_s is None else ForwardDecay(half_life_s)

    def add(self, edges: Int64, weights: Float32, impressions: Float32, rewards: Float32, times_ms: Int64) -> None:
        """Add N events: places [N, K] (-1: no edge), weights as served [N, K], impressions, rewards and times [N]."""
        if self._decay is None:
            decays = np.ones(len(edges))
        else:
            factor = self._decay.rescale(int(times_ms.max(initial=0))) if len(edges) else None
            if factor is not None:
                self.sums *= factor
            decays = np.array([self._decay.weight(t) for t in times_ms.tolist()])
        _add(self.sums, edges, weights, impressions, rewards, decays)

    def scale(self, now_ms: int) -> float:
        """What sums are multiplied by to be as of now; 0 before anything was added, and once all is forgotten."""
        return 1.0 if self._decay is None else self._decay.decay(now_ms)
