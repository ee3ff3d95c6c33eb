"""How often keys without a row were seen: exact counts, any threshold."""

from __future__ import annotations

import numpy as np

from recsys.table import worth
from recsys.table.base import Layout, Pending
from recsys.table.index import KeyIndex
from recsys.table.rows import LAST_SEEN_STEP_MS, last_seen
from recsys.types import Int32, Int64


class PendingCounts:
    """Counts of unadmitted keys, in an index of their own that doubles as needed. Not thread-safe.

    Of a layout with `spare` there are at most as many as rows: those of least worth are forgotten.
    """

    def __init__(self, layout: Layout, place_of: Int32, slot_of: Int32) -> None:
        self._layout, self._place_of, self._slot_of = layout, place_of, slot_of
        self.windows = worth.Windows()
        self._resize_to(0)

    def __len__(self) -> int:
        return len(self._index)

    def memory_bytes(self) -> int:
        return self._index.index_bytes + 20 * self._index.end if len(self._counts) > 1 else 0

    def get(self, slots: Int32, keys: Int64) -> Int64:
        """Counts [N], 0 where never seen."""
        at, _ = self._index.find(slots, keys)
        missing = at[1] < 0
        return np.where(missing, 0, self._counts[np.where(missing, 0, at[0])])

    def put(self, slots: Int32, keys: Int64, counts: Int64, last_seen_ms: Int64) -> None:
        """Set the counts of unique keys; last-seen never goes back."""
        if self._layout.spare:
            kept = self._make_room(slots, keys)
            slots, keys, counts, last_seen_ms = slots[kept], keys[kept], counts[kept], last_seen_ms[kept]
        room = len(self._counts) - 1
        if len(self) + len(keys) > room:
            old = self.export()
            self._resize_to(max(2 * room, len(self) + len(keys), 1024))
            self._enter(old.slots, old.keys, old.counts, old.last_seen_ms)
        self._enter(slots, keys, counts, last_seen_ms)

    def _enter(self, slots: Int32, keys: Int64, counts: Int64, last_seen_ms: Int64) -> None:
        self._index.reserve(len(keys))
        at, _ = self._index.find(slots, keys)
        known = at[1] >= 0
        self._index.insert(slots, keys, at, np.arange(len(keys), dtype=np.int32))
        rows = at[0]
        self._counts[rows] = counts
        self._last_seen_ms[rows] = np.where(known, np.maximum(self._last_seen_ms[rows], last_seen_ms), last_seen_ms)

    def _make_room(self, slots: Int32, keys: Int64) -> Int64:
        """Forget what is worth least, so that these keys can be counted; which of them can [M], the first ones."""
        over = len(self) + len(keys) - self._layout.capacity
        if over <= 0:
            return np.arange(len(keys))
        count = worth.with_slack(self._layout, over)
        positions, hashed = self._index.survey(self.windows.next(len(self), worth.looks_for(count)))
        places, waiting, rows, _, _ = self._index.read(positions)
        steps = last_seen(self._last_seen_ms[rows]) // LAST_SEEN_STEP_MS
        gone = worth.least(steps + worth.HALF_LIFE * worth.level_of(self._counts[rows]), hashed, count)
        self._index.remove(self._slot_of[places[gone]], waiting[gone])
        new = self._index.find(slots, keys)[0][1] < 0
        return np.flatnonzero(~new | (np.cumsum(new) <= self._layout.capacity - len(self)))

    def remove(self, slots: Int32, keys: Int64) -> None:
        """Forget the keys; unknown ones are ignored."""
        if len(self):
            self._index.remove(slots, keys)

    def expire(self, cutoff_ms: Int64) -> None:
        """Forget keys not seen since their slot's cutoff."""
        if len(self):
            now = self.export()
            gone = now.last_seen_ms <= cutoff_ms[now.slots]
            self.remove(now.slots[gone], now.keys[gone])

    def export(self) -> Pending:
        places, keys, rows, _, _ = self._index.read(self._index.changed())
        return Pending(
            slots=self._slot_of[places], keys=keys, counts=self._counts[rows], last_seen_ms=self._last_seen_ms[rows]
        )

    def _resize_to(self, room: int) -> None:
        self._index = KeyIndex(room, 1, self._place_of, order=self._layout.order)
        self._counts = np.zeros(1 + room, np.int64)
        self._last_seen_ms = np.zeros(1 + room, np.int64)
