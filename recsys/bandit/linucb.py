"""Full LinUCB over cluster weights: one matrix an item. What Diag-LinUCB approximates, and is measured against.

Legend: J items, C clusters, K active clusters, M candidates, N events.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.bandit.base import Events, Requests
from recsys.compiled import compiled
from recsys.decay import ForwardDecay
from recsys.types import Float32


@compiled
def _learn(inverse: Any, theta: Any, clusters: Any, weights: Any, amount: Any, reward: Any) -> None:
    """A ← A + amount w wᵀ and b ← b + reward w on A⁻¹ [C, C] and θ = A⁻¹ b [C], reading only the K rows of active clusters."""
    size = len(theta)
    column = np.zeros(size, np.float32)
    for k in range(len(clusters)):
        row, weight = inverse[clusters[k]], weights[k]
        for c in range(size):
            column[c] += weight * row[c]
    width, mean = np.float32(0), np.float32(0)
    for k in range(len(clusters)):
        width += weights[k] * column[clusters[k]]
        mean += weights[k] * theta[clusters[k]]
    share = amount / (np.float32(1) + amount * width)
    step = reward * (np.float32(1) - share * width) - share * mean
    for c in range(size):
        theta[c] += step * column[c]
    if share > 0:
        for c in range(size):
            if column[c] != 0:
                scaled, row = share * column[c], inverse[c]
                for other in range(size):
                    row[other] -= scaled * column[other]


@compiled
def _score(inverse: Any, theta: Any, items: Any, clusters: Any, weights: Any, out: Any) -> None:
    """Means and squared widths, out [M, 2], of items [M]: ⟨w, θ⟩ and wᵀA⁻¹w over the K × K entries that w is not 0 in."""
    active = len(clusters)
    for n in range(len(items)):
        matrix, parameters = inverse[items[n]], theta[items[n]]
        mean, square = np.float32(0), np.float32(0)
        for k in range(active):
            row = matrix[clusters[k]]
            mean += weights[k] * parameters[clusters[k]]
            half = np.float32(0.5) * weights[k] * row[clusters[k]]
            for other in range(k):
                half += weights[other] * row[clusters[other]]
            square += np.float32(2) * weights[k] * half
        out[n, 0], out[n, 1] = mean, square


class LinUcb:
    """⟨w, θ⟩ + α √(wᵀA⁻¹w), A = prior I + Σ w wᵀ, kept as A⁻¹ by Sherman-Morrison in float32: 4 C² bytes an item.

    With a half-life A and b, the prior too, decay as the sums of `EdgeSums` do.
    """

    def __init__(
        self, num_items: int, num_clusters: int, alpha: float, half_life_s: float | None = None, prior: float = 1.0
    ) -> None:
        self._alpha = np.float32(alpha)
        self._inverse = np.zeros((num_items, num_clusters, num_clusters), np.float32)
        self._inverse[:, np.arange(num_clusters), np.arange(num_clusters)] = 1.0 / prior
        self._theta = np.zeros((num_items, num_clusters), np.float32)
        self._decay = None if half_life_s is None else ForwardDecay(half_life_s, 40)

    def means_and_widths(self, requests: Requests) -> tuple[Float32, Float32]:
        """⟨w, θ⟩ and √(wᵀA⁻¹w) of each candidate, [M] each."""
        out = np.zeros((len(requests.items), 2), np.float32)
        for request, (start, end) in enumerate(zip(requests.starts[:-1], requests.starts[1:], strict=True)):
            clusters, weights = requests.clusters[request], requests.weights[request]
            _score(self._inverse, self._theta, requests.items[start:end], clusters, weights, out[start:end])
        scale = 1.0 if self._decay is None else self._decay.decay(requests.now_ms)
        return out[:, 0], np.sqrt(np.maximum(out[:, 1], 0) / np.float32(scale or 1.0))

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, None]:
        mean, width = self.means_and_widths(requests)
        return mean + self._alpha * width, None

    def learn(self, events: Events) -> None:
        decays = np.ones(len(events.items), np.float32)
        if self._decay is not None and len(events.items):
            factor = self._decay.rescale(int(events.times_ms.max()))
            if factor is not None:
                self._inverse /= np.float32(factor)
            decays = np.array([self._decay.weight(t) for t in events.times_ms.tolist()], np.float32)
        for n, item in enumerate(events.items.tolist()):
            _learn(
                self._inverse[item],
                self._theta[item],
                events.clusters[n],
                events.weights[n],
                decays[n] * events.impressions[n],
                decays[n] * events.rewards[n],
            )
