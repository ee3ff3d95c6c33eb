"""A counting filter: how often keys without a row were seen, in memory that does not grow (count-min sketch)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recsys.table.base import Layout, Pending
from recsys.table.rows import filter_period_ms, filter_places
from recsys.types import Int32, Int64, UInt8


class CountingFilter:
    """Four rows of counters (Cormode and Muthukrishnan 2005); a key's count is at most the least of its four. Not thread-safe.

    A new key among n others that each came once is admitted at its first occurrence, where two are asked, with probability
    (1 - exp(-4 n / counters))⁴ at most: .025 at n = counters / 8, .16 at a quarter. Counts stop at 255.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._period_ms = filter_period_ms(layout)
        self._halved_ms = 0
        self.counters = np.zeros(-(-layout.filter_counters // 4) * 4, np.uint8)

    def counted(self, slots: Int32, keys: Int64) -> tuple[tuple[Int64, UInt8], Int64]:
        """How the counters would be with these occurrences, to be `set`, and the least of each key's four [N] then."""
        places = filter_places(self._layout, slots, keys)
        unique, inverse, times = np.unique(places, return_inverse=True, return_counts=True)
        counts = np.minimum(self.counters[unique] + times, 255)
        return (unique, counts.astype(np.uint8)), counts[inverse.reshape(places.shape)].min(axis=0)

    def set(self, counted: tuple[Int64, UInt8], now_ms: int) -> None:
        """Keep what `counted` found."""
        self._halved_ms = self._halved_ms or now_ms
        self.counters[counted[0]] = counted[1]

    def halve(self, now_ms: int) -> None:
        """Halve all counts, once for each period that has passed."""
        while self._halved_ms and self._period_ms and now_ms - self._halved_ms >= self._period_ms:
            self.counters >>= np.uint8(1)
            self._halved_ms += self._period_ms

    def add_to(self, pending: Pending) -> Pending:
        return replace(pending, sketch=self.counters.copy(), sketch_ms=self._halved_ms)

    def restore(self, pending: Pending) -> None:
        self.counters[:] = pending.sketch
        self._halved_ms = pending.sketch_ms
