"""The bandit's sums on its edges: rows of the table `edge`, and what gives them their meaning.

An edge is a row: slot = the cluster's place, key = the item's, values d = Σ w², n = Σ w (added when the item counts as shown) and
b = Σ w r (added when it is rewarded), w being the cluster's weight as served. A sum does not care for order, batch or who adds it.
With a half-life, what is added at log time t weighs 2^(t / half-life) (forward decay), by the impression's time, so that a late
reward weighs as much as what it rewards.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay
from recsys.table.base import Rows, Table
from recsys.table.fit import restore_within
from recsys.types import Float32, Int32, Int64

Arrays = dict[str, npt.NDArray[Any]]
logger = logging.getLogger("recsys")
MAX_EXPONENT = 64
"""Half-lives after which all edges are rescaled: float32 holds 127, and a sum may be large itself."""
CURSOR = "edges of a place"


class EdgeSums:
    """One writer. What changes all rows at once says so: readers are to be told of them."""

    def __init__(self, table: Table, half_life_s: float | None) -> None:
        self.table = table
        self.decay = ForwardDecay(half_life_s, MAX_EXPONENT) if half_life_s else None
        self._now_ms = 0
        """Of the latest step."""

    def worth(self, time_ms: int) -> float:
        """What is added to an edge by an impression of that log time with weight 1."""
        return 1.0 if self.decay is None else self.decay.weight(time_ms)

    def step(self, now_ms: int) -> bool:
        """Log time went on; whether all sums were rescaled."""
        self._now_ms = max(self._now_ms, now_ms)
        if self.decay is None or (factor := self.decay.rescale(now_ms)) is None:
            return False
        self._rescale(factor)
        return True

    def set_back(self, now_ms: int) -> bool:
        """Log time was ahead: the sums are as of `now_ms`; whether that changes what they mean."""
        self._now_ms = min(self._now_ms, now_ms)
        if self.decay is None:
            return False
        self.decay.restore(self.decay.state(), latest_ms=now_ms)
        return True

    def add(self, slots: Int32, keys: Int64, sums: Float32, now_ms: int) -> None:
        """All edges of a step in one update: what several impressions add to an edge is summed first, in float64. An edge that
        is shown and rewarded in one step is used once."""
        shown = sums[:, 1] > 0
        # A reward alone does not make an edge: of one that was forgotten since, its impression is forgotten, too.
        known = shown if shown.all() else shown | self.table.lookup(slots, keys)[1]
        self.table.lookup_train(slots[known], keys[known], now_ms)
        there = self.table.lookup(slots, keys)[1]  # what finds no room in a full table is not counted
        self.table.apply_gradients(slots[there], keys[there], -sums[there], now_ms)

    def drop(self, place: int) -> None:
        """A cluster is gone: its edges are, too."""
        rows = self.rows(place)
        self.table.remove(rows.slots, rows.keys)

    def split(self, parent: int, child: int) -> None:
        """A cluster became two: each has half of what its edges were."""
        rows = self.rows(parent)
        rows = replace(rows, values=rows.values * np.float32(0.5))
        restore_within(self.table, rows)
        restore_within(self.table, replace(rows, slots=np.full_like(rows.slots, child)))

    def rows(self, place: int | None = None) -> Rows:
        """All edges, or those of one place."""
        touched = self.table.touched(CURSOR)
        self.table.release(CURSOR)
        chosen = np.ones(len(touched.keys), np.bool_) if place is None else touched.slots == place
        return self.table.export(touched.slots[chosen], touched.keys[chosen])

    def _rescale(self, factor: float) -> None:
        rows = self.rows()
        self.table.restore(replace(rows, values=rows.values * np.float32(factor)))

    def clock(self) -> Arrays:
        """What gives the sums their meaning: the decay's state, the latest step's log time, and its half-life (0: none)."""
        state = (-(2**63), 0, self._now_ms) if self.decay is None else self.decay.state()
        half_life_s = 0.0 if self.decay is None else self.decay.half_life_ms / 1000
        return {"decay": np.array(state, np.int64), "half_life_s": np.array([half_life_s])}

    def restore(self, clock: list[int], half_life_s: npt.NDArray[np.float64] | None) -> bool:
        """Take over the edges, which the table holds already, in the units that they were saved in: another half-life keeps what they are
        as of the last step. Whether all of them were rescaled."""
        own = self.decay.half_life_ms / 1000 if self.decay is not None else 0.0
        saved = own if half_life_s is None else float(half_life_s[0])
        self._now_ms = clock[2] if len(clock) > 2 else 0
        factor = 1.0
        if saved and self.decay is not None:
            factor = self.decay.restore(clock, saved)
        elif self.decay is not None and self._now_ms:
            self.decay.rescale(self._now_ms)
        elif saved:
            decay = ForwardDecay(saved, MAX_EXPONENT)
            decay.restore(clock)
            factor = decay.decay(self._now_ms)
        rows = self.rows()
        usable = (np.isfinite(rows.values) & (rows.values >= 0)).all(1)
        if not usable.all():
            logger.error("%d edges of the bandit held no counts and begin anew", np.count_nonzero(~usable))
            self.table.remove(rows.slots[~usable], rows.keys[~usable])
        if factor != 1.0:
            self._rescale(factor)
        return factor != 1.0
