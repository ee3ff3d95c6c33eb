"""What keeps a slate varied: caps, likeness to the items above (MMR, DPP), coverage of attribute values.

Legend: K candidates, w columns of an attribute, V distinct values of it among the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.features.catalogue import Catalogue
from recsys.features.overflow import NONE
from recsys.types import Bool, Int32

Float64 = npt.NDArray[np.float64]

_LEAST = 1e-6
"""Least volume that a candidate adds (DPP): an item alike in everything loses 13.8 times the weight, and none is worth minus infinity."""


@dataclass(frozen=True, slots=True)
class Values:
    """An attribute's values of the candidates as numbers below `num` [K, w], each once an item; `num` itself: none."""

    codes: Int32
    num: int


def values_of(catalogue: Catalogue, rows: Int32, attribute: str, *, every: bool = False) -> Values:
    """An attribute's values of the items at `rows` [K]: those that have a column, or `every` one."""
    columns = catalogue.columns(attribute)
    keys, mask = catalogue.keys[rows][:, columns], catalogue.mask[rows][:, columns]
    width = keys.shape[1]
    places, further = catalogue.overflow.of(attribute, rows) if every else NONE
    if len(places):
        # Those of one item lie side by side: each goes to the next column behind its item's own.
        counts = np.bincount(places, minlength=len(rows))
        at = width + np.arange(len(places)) - (np.cumsum(counts) - counts)[places]
        room = ((0, 0), (0, int(counts.max())))
        keys, mask = np.pad(keys, room), np.pad(mask, room)
        keys[places, at], mask[places, at] = further, True
    distinct, numbers = np.unique(keys[mask], return_inverse=True)
    codes: Int32 = np.full(keys.shape, len(distinct), np.int32)
    codes[mask] = numbers
    for column in range(1, width):
        again = (codes[:, :column] == codes[:, column : column + 1]).any(1)
        codes[again, column] = len(distinct)
    return Values(codes, len(distinct))


class Cap:
    """At most `most` items with one value, in the whole answer or among any `window` positions in a row.

    Items pinned further down count at once, so that none above takes their place away.
    """

    def __init__(self, values: Values, most: int, window: int, pins: Mapping[int, int]) -> None:
        self._codes, self._num, self._most, self._window = values.codes, values.num, most, window
        self._pins = pins
        self._shown: list[int] = []

    def blocked(self) -> Bool:
        position = len(self._shown) + 1
        counts: npt.NDArray[np.intp] = np.zeros(self._num + 1, np.intp)
        for window in self._windows(position):
            counts = np.maximum(counts, np.bincount(self._codes[window].ravel(), minlength=self._num + 1))
        full = counts >= self._most
        full[-1] = False
        blocked: Bool = np.logical_or.reduce(full[self._codes], axis=1)
        return blocked

    def _windows(self, position: int) -> list[list[int]]:
        """The candidates beside the next one in each window that it falls into."""
        below = {at: candidate for at, candidate in self._pins.items() if at > position}
        if not self._window:
            return [[*self._shown, *below.values()]]
        last = max((at for at in below if at < position + self._window), default=position)
        starts = range(position - self._window + 1, last - self._window + 2)
        return [
            [*self._shown[max(0, start - 1) :], *(c for at, c in below.items() if at < start + self._window)]
            for start in starts
        ]

    def add(self, candidate: int) -> None:
        self._shown.append(candidate)


class Likeness:
    """How alike candidates are: the cosine of their sets of attribute values, from 0 to 1; 0 without values."""

    def __init__(self, values: Sequence[Values]) -> None:
        starts = np.cumsum([0, *(v.num + 1 for v in values)])
        self._codes = np.concatenate([v.codes + start for v, start in zip(values, starts, strict=False)], 1)
        self._has = np.concatenate([v.codes < v.num for v in values], 1)
        self._num = int(starts[-1])
        self._root = np.sqrt(self._has.sum(1))

    def to(self, candidate: int) -> Float64:
        """Of all candidates to this one [K]."""
        member = np.zeros(self._num, np.bool_)
        member[self._codes[candidate][self._has[candidate]]] = True
        shared = member[self._codes].sum(1)
        return np.divide(shared, self._root * self._root[candidate], out=np.zeros(len(shared)), where=shared > 0)

    def __len__(self) -> int:
        return len(self._codes)


class Mmr:
    """Maximal marginal relevance (Carbonell and Goldstein 1998): less the weight times the likeness to the most alike item above."""

    def __init__(self, likeness: Likeness, weight: float) -> None:
        self._likeness, self._weight = likeness, weight
        self.values: Float64 = np.zeros(len(likeness))

    def add(self, candidate: int) -> None:
        self.values = np.minimum(self.values, -self._weight * self._likeness.to(candidate))


class Dpp:
    """Greedy search for the most probable slate of a determinantal point process (Chen, Zhang and Zhou 2018).

    The process has kernel q_i S_ij q_j, where S is the likeness (1 to itself) and log q_i^2 = worth_i / weight: the candidate that
    adds most to the logarithm of its determinant has the largest worth_i + weight log d_i^2, where d_i^2 is what of i lies outside
    of the span of the items above. Each step costs K times the number of items above.
    """

    def __init__(self, likeness: Likeness, weight: float) -> None:
        self._likeness, self._weight = likeness, weight
        self._outside = np.ones(len(likeness))
        self._factors = np.zeros((0, len(likeness)))
        self.values: Float64 = np.zeros(len(likeness))

    def add(self, candidate: int) -> None:
        like = self._likeness.to(candidate)
        like[candidate] = 1.0
        inside = self._factors[:, candidate] @ self._factors
        factor = (like - inside) / np.sqrt(self._outside[candidate])
        self._factors = np.concatenate([self._factors, factor[None]])
        self._outside = np.maximum(self._outside - factor**2, _LEAST)
        self.values = self._weight * np.log(self._outside)


class Coverage:
    """Diminishing gain of an attribute's values: a submodular function of the slate.

    The slate is worth the weight times sum over values of log(1 + number of its items with that value), where an item with
    several values counts for each by its share; a candidate gains what it adds.
    """

    def __init__(self, values: Values, weight: float) -> None:
        self._codes, self._weight = values.codes, weight
        has = values.codes < values.num
        self._share = np.where(has, 1.0 / np.maximum(has.sum(1), 1)[:, None], 0.0)
        self._covered = np.zeros(values.num + 1)
        self.values: Float64 = self._gain()

    def _gain(self) -> Float64:
        gain: Float64 = self._weight * np.log1p(self._share / (1.0 + self._covered[self._codes])).sum(1)
        return gain

    def add(self, candidate: int) -> None:
        self._covered[self._codes[candidate]] += self._share[candidate]
        self._covered[-1] = 0.0
        self.values = self._gain()
