"""Counts at items: at once where the item is known, when it comes where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from recsys import metrics
from recsys.candidates.base import Counted, Parts
from recsys.candidates.counter_feed import CounterFeed
from recsys.candidates.waiting_counts import Count, Held
from recsys.capacity import entries

_HELD_BYTES = 1500
"""Of a count that waits for its item."""


class ItemCounts:
    """Feeds counters and sources by rows. Its owner's lock makes one cut of it."""

    def __init__(self, parts: Parts, counting: CounterFeed, tell: Callable[[Counted], None]) -> None:
        """`tell`: called with each event that sources count."""
        self._catalogue, self._counting, self._tell = parts.catalogue, counting, tell
        self.held = Held(entries(parts.config.capacity.memory_bytes, "held", _HELD_BYTES))

    def count(self, item_id: str, count: Count) -> None:
        """Count at the item; where it is not known yet, when it is."""
        row = self._catalogue.row(item_id)
        if row is None:
            metrics.NOT_COUNTED.labels("unknown_item").inc(self.held.add(item_id, count))
            return
        if count.follower is not None:
            later = self._catalogue.row(count.follower[0])
            if later is not None:
                self._tell(Counted(later, [*[-1] * count.follower[1], row], count.now_ms, 0.0, None))
            return
        if count.values:
            self._counting.count(count, np.array([row], np.int32))
        if count.before is not None:
            self._event(item_id, row, count, count.before)

    def _event(self, item_id: str, row: int, count: Count, before: Sequence[str]) -> None:
        """An event that trending and co-visits count, after the session's earlier ones."""
        now_ms, known = count.now_ms, [self._catalogue.row(earlier) for earlier in before]
        self._tell(Counted(row, [-1 if r is None else r for r in known], now_ms, count.weight, count.shared))
        for place, earlier in enumerate(before):
            if known[place] is None:
                self.count(earlier, Count(now_ms, follower=(item_id, place)))

    def release(self, item_id: str) -> None:
        """Count what waited for an item that is known now."""
        for count in self.held.take(item_id):
            self.count(item_id, count)

    def release_known(self) -> None:
        """Count what waited for items that are known by now."""
        for item_id in self.held.item_ids:
            if self._catalogue.row(item_id) is not None:
                self.release(item_id)
