"""Intervals of the progressive metrics by bootstrap over users (Efron 1979): what one user does is not independent.

Legend: N examples, U users, B resamples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.types import Int64

Array = npt.NDArray[Any]
RESAMPLES = 200
"""Half makes an interval's ends a third noisier, double costs a second more a task."""
LEVEL = 0.95


class Resamples:
    """How often each user is drawn in each resample [B, U]; the same for every metric. NaN for a single user, who tells nothing of others."""

    def __init__(self, users: Int64, seed: int = 0) -> None:
        self._users, self.of = np.unique(users, return_inverse=True)
        num = len(self._users)
        rng = np.random.default_rng(seed)
        weights = np.stack([np.bincount(rng.integers(0, num, num), minlength=num) for _ in range(RESAMPLES)])
        self.weights: Array = weights if num > 1 else np.full(weights.shape, math.nan)

    def sums(self, values: Array) -> Array:
        """Sum over the examples [N] of each resample [B]."""
        totals: Array = self.weights @ np.bincount(self.of, values, len(self._users))
        return totals

    def auc(self, predictions: Array, labels: Array) -> Array:
        """AUC of each resample [B], ties counting half."""
        order = np.argsort(predictions, kind="stable")
        scores, positive, users = predictions[order], labels[order].astype(np.float64), self.of[order]
        starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
        areas = np.empty(len(self.weights))
        for index, drawn in enumerate(self.weights):
            weight = drawn[users].astype(np.float64)
            up = np.add.reduceat(weight * positive, starts)
            down = np.add.reduceat(weight, starts) - up
            pairs = up.sum() * down.sum()
            areas[index] = (up * (np.cumsum(down) - down / 2)).sum() / pairs if pairs else math.nan
        return areas


def interval(values: Array) -> list[float] | None:
    """The middle 95% of what the resamples say; None when fewer than half say anything."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return [low, high]
