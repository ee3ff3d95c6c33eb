"""How often keys without a row were seen: exact counts, any threshold."""

from __future__ import annotations

import numpy as np

from recsys.table.base import Pending
from recsys.table.index import KeyIndex
from recsys.types import Int32, Int64


class PendingCounts:
    """Counts of unadmitted keys, in an index of their own that doubles as needed. Not thread-safe."""

    def __init__(self, fallback: Int32) -> None:
        self._fallback = np.where(fallback >= 0, 0, -1).astype(np.int32)  # row 0 stands for: not counted
        self._index = KeyIndex(0, first=1)
        self._counts = np.zeros(1, np.int64)
        self._last_seen_ms = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self._index)

    def memory_bytes(self) -> int:
        return self._index.index_bytes + 32 * self._index.end

    def get(self, slots: Int32, keys: Int64) -> Int64:
        """Counts [N], 0 where never seen."""
        return self._counts[self._index.find(slots, keys, self._fallback)]

    def put(self, slots: Int32, keys: Int64, counts: Int64, last_seen_ms: Int64) -> None:
        """Set the counts of unique keys; last-seen never goes back."""
        room = len(self._counts) - 1
        if len(self) + len(keys) > room:
            self._resize(max(2 * room, len(self) + len(keys), 1024))
        self._index.reserve(len(keys))
        known = self._index.find(slots, keys, self._fallback) > 0
        rows = self._index.insert(slots, keys)
        self._counts[rows] = counts
        self._last_seen_ms[rows] = np.where(known, np.maximum(self._last_seen_ms[rows], last_seen_ms), last_seen_ms)

    def remove(self, slots: Int32, keys: Int64) -> None:
        """Forget the keys; unknown ones are ignored."""
        if len(self):
            self._index.remove(slots, keys)

    def expire(self, cutoff_ms: Int64) -> None:
        """Forget keys not seen since their slot's cutoff."""
        rows = self._index.live()
        slots, keys = self._index.owner_slot[rows], self._index.owner_key[rows]
        gone = self._last_seen_ms[rows] <= cutoff_ms[slots]
        self.remove(slots[gone], keys[gone])

    def export(self) -> Pending:
        rows = self._index.live()
        return Pending(
            slots=self._index.owner_slot[rows],
            keys=self._index.owner_key[rows],
            counts=self._counts[rows],
            last_seen_ms=self._last_seen_ms[rows],
        )

    def _resize(self, room: int) -> None:
        old = self.export()
        self._index = KeyIndex(room, first=1)
        self._counts = np.zeros(1 + room, np.int64)
        self._last_seen_ms = np.zeros(1 + room, np.int64)
        self.put(old.slots, old.keys, old.counts, old.last_seen_ms)
