"""When a row was last seen, in 24 bits of its index entry: steps of 8 s, over four years, from a base of the table."""

from __future__ import annotations

import numpy as np

from recsys.table.index import KeyIndex
from recsys.table.kernels import MAX_STAMP
from recsys.table.rows import LAST_SEEN_STEP_MS
from recsys.types import Int64

_MIDDLE = 2**23


class Stamps:
    """The first time a table sees becomes the middle: two years before and after it have stamps of their own.

    When a later time has none, all stamps move down; what would fall below the lowest, or is older, gets that one.
    """

    def __init__(self, index: KeyIndex) -> None:
        self._index = index
        self._base: int | None = None

    def of(self, time_ms: int) -> int:
        """The stamp of a time, at least 1: the end of its step, so that nothing expires too early."""
        step = -(-time_ms // LAST_SEEN_STEP_MS)
        if self._base is None:
            self._base = step - _MIDDLE
        if step - self._base > MAX_STAMP:
            self._move(step - self._base - _MIDDLE)
        return max(step - self._base, 1)

    def of_all(self, times_ms: Int64) -> Int64:
        """The stamps of many times."""
        if not len(times_ms):
            return times_ms
        self.of(int(times_ms.max()))
        assert self._base is not None
        return np.maximum(-(-times_ms // LAST_SEEN_STEP_MS) - self._base, 1)

    def times_ms(self, stamps: Int64) -> Int64:
        return (stamps + (self._base or 0)) * LAST_SEEN_STEP_MS

    def expired_below(self, cutoff_ms: int) -> int:
        """Stamps below this one were last seen at the cutoff or before it."""
        step = cutoff_ms // LAST_SEEN_STEP_MS
        return 0 if self._base is None else min(max(step - self._base + 1, 0), MAX_STAMP + 1)

    def _move(self, down: int) -> None:
        assert self._base is not None
        self._base += down
        positions = self._index.changed()
        packed = self._index.arrays.entries[positions, 1]
        stamps = np.maximum((packed >> 40 & MAX_STAMP) - down, 1)
        self._index.arrays.entries[positions, 1] = packed & (2**40 - 1) | stamps << 40
