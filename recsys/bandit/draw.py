"""From values to one drawn candidate: pools, probabilities with a floor, propensities.

Legend: B requests, M candidates of all requests together, S largest size of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.base import Choices, Requests
from recsys.compiled import compiled
from recsys.types import Bool, Float32, Int64

Float64 = npt.NDArray[np.float64]
Chances = Callable[[Float64, Int64], Float64]
"""Probabilities [B, S] of pools from their values [B, S], best first, and sizes [B] of 1 or more; 0 beyond a pool's end."""


def even(values: Float64, sizes: Int64) -> Float64:
    """Each alike: what the best S of a ranking are drawn by, so that one push of parameters does not fix one answer."""
    return np.where(_inside(values, sizes), 1.0 / sizes[:, None], 0.0)


def only_best(values: Float64, sizes: Int64) -> Float64:
    """All for the first."""
    chances = np.zeros(values.shape)
    chances[:, 0] = 1.0
    return chances


def mostly_best(values: Float64, sizes: Int64, epsilon: float) -> Float64:
    """ε shared by all, the rest for the first."""
    return (1.0 - epsilon) * only_best(values, sizes) + epsilon * even(values, sizes)


def inverse_gap(values: Float64, sizes: Int64, gamma: float) -> Float64:
    """1 / (S + γ (best - value)) for all but the best, which gets the rest (SquareCB; Foster and Rakhlin, ICML 2020).

    Values are predicted rewards. γ grows like √(S · rounds): larger is greedier.
    """
    chances = np.where(_inside(values, sizes), 1.0 / (sizes[:, None] + gamma * (values[:, :1] - values)), 0.0)
    chances[:, 0] = 0.0
    chances[:, 0] = 1.0 - chances.sum(1)
    return chances


def floored(chances: Float64, sizes: Int64, floor: float) -> Float64:
    """Mixed with an even draw, so that each is at least the floor; a floor that a pool is too large for becomes 1/S."""
    floors = np.minimum(floor, 1.0 / sizes)[:, None]
    mixed: Float64 = np.where(_inside(chances, sizes), floors, 0.0) + (1.0 - sizes[:, None] * floors) * chances
    return mixed


def _inside(values: Float64, sizes: Int64) -> Bool:
    return np.arange(values.shape[1]) < sizes[:, None]


@compiled
def _fill(starts: Any, values: Any, first: Any, ties: Any, pool: Any) -> None:
    """The best of each request into pool [B, S], by insertion: those of `first`, then the larger value, then the larger tie.

    A few steps a candidate for small pools of random order; S/4 for a pool of all.
    """
    size = pool.shape[1]
    for request in range(len(pool)):
        best, count = pool[request], 0
        for at in range(starts[request], starts[request + 1]):
            place = count
            while place > 0:
                other = best[place - 1]
                if first[at] != first[other]:
                    ahead = first[at]
                elif values[at] != values[other] and not first[at]:
                    ahead = values[at] > values[other]
                else:
                    ahead = ties[at] > ties[other]
                if not ahead:
                    break
                if place < size:
                    best[place] = other
                place -= 1
            if place < size:
                best[place] = at
                count = min(count + 1, size)


def draw(requests: Requests, values: Float32, first: Bool | None, size: int, chances: Chances, rng: Any) -> Choices:
    """Keep the `size` best candidates of each request (0: all) and draw one by `chances`.

    Those of `first` come before all others in random order, and ties are broken at random. `chances` sees their values as they are.
    """
    candidates = np.diff(requests.starts)
    sizes = candidates if size == 0 else np.minimum(candidates, size)
    pool = np.full((len(sizes), int(sizes.max(initial=0))), -1, np.int64)
    if first is None:
        first = np.zeros(len(values), np.bool_)
    ties = rng.random(len(values), np.float32)
    _fill(requests.starts, values, first, ties, pool)
    drawn, propensity = np.full(len(sizes), -1, np.int64), np.zeros(len(sizes), np.float32)
    probabilities = np.zeros(pool.shape, np.float32)
    some = sizes > 0
    if some.any():
        given = chances(values[pool[some]].astype(np.float64), sizes[some])
        below = np.cumsum(given, 1) <= rng.random((len(given), 1))
        at = np.minimum(below.sum(1), sizes[some] - 1)[:, None]
        probabilities[some] = given
        drawn[some] = np.take_along_axis(pool[some], at, 1)[:, 0]
        propensity[some] = np.take_along_axis(given, at, 1)[:, 0]
    return Choices(pool=pool, probabilities=probabilities, drawn=drawn, propensity=propensity)
