"""From values to one drawn candidate: pools, probabilities with a floor, propensities.

Legend: B requests, M candidates of all requests together, S size of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.base import Choices, Requests
from recsys.bandit.score import best
from recsys.types import Bool, Float32

Float64 = npt.NDArray[np.float64]
Chances = Callable[[Float64], Float64]
"""Probabilities [S] of a pool's candidates from their values [S], best first."""


def even(values: Float64) -> Float64:
    """Each alike: what the best S of a ranking are drawn by, so that one push of parameters does not fix one answer."""
    return np.full(len(values), 1.0 / len(values))


def only_best(values: Float64) -> Float64:
    """All for the first."""
    chances = np.zeros(len(values))
    chances[0] = 1.0
    return chances


def mostly_best(values: Float64, epsilon: float) -> Float64:
    """ε shared by all, the rest for the first."""
    return floored(only_best(values), epsilon / len(values))


def inverse_gap(values: Float64, gamma: float) -> Float64:
    """1 / (S + γ (best - value)) for all but the best, which gets the rest (SquareCB; Foster and Rakhlin, ICML 2020).

    Values are predicted rewards. γ grows like √(S · rounds): larger is greedier.
    """
    chances = 1.0 / (len(values) + gamma * (values[0] - values))
    chances[0] = 0.0
    chances[0] = 1.0 - chances.sum()
    return chances


def floored(chances: Float64, floor: float) -> Float64:
    """Mixed with an even draw, so that each is at least the floor; a floor that a pool is too large for becomes 1/S."""
    floor = min(floor, 1.0 / len(chances))
    mixed: Float64 = floor + (1.0 - len(chances) * floor) * chances
    return mixed


def draw(requests: Requests, values: Float32, first: Bool | None, size: int, chances: Chances, rng: Any) -> Choices:
    """Keep the `size` best candidates of each request (0: all), those of `first` before all others, and draw one.

    A pool that holds fresh items first passes their values to `chances` as they are: those of a rule must allow for it.
    """
    starts = requests.starts
    sizes = np.diff(starts) if size == 0 else np.minimum(np.diff(starts), size)
    num, width = len(sizes), int(sizes.max(initial=0))
    pool, probabilities = np.full((num, width), -1, np.int64), np.zeros((num, width), np.float32)
    drawn, propensity = np.full(num, -1, np.int64), np.zeros(num, np.float32)
    for request in np.flatnonzero(sizes):
        start, end, count = starts[request], starts[request + 1], sizes[request]
        mine = values[start:end]
        order = best(mine, count, rng, None if first is None else first[start:end])
        given = chances(mine[order].astype(np.float64))
        at = min(int(np.searchsorted(np.cumsum(given), rng.random(), side="right")), count - 1)
        pool[request, :count], probabilities[request, :count] = start + order, given
        drawn[request], propensity[request] = start + order[at], given[at]
    return Choices(pool=pool, probabilities=probabilities, drawn=drawn, propensity=propensity)
