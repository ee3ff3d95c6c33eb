"""Which keys get a row: those seen often enough, counted exactly or by a filter of bounded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from recsys.table.base import Layout, Pending
from recsys.table.filter import CountingFilter
from recsys.table.index import group
from recsys.table.pending import PendingCounts
from recsys.table.rows import check_sketch
from recsys.types import Int32, Int64


class Admission:
    """Counts of keys without a row. Not thread-safe."""

    def __init__(self, layout: Layout, place_of: Int32, slot_of: Int32) -> None:
        self._layout, self._place_of, self._slot_of = layout, place_of, slot_of
        self._threshold = np.ones(len(place_of), np.int64)
        self._threshold[slot_of] = [layout.slots[slot].admission for slot in slot_of.tolist()]
        self.at_once = bool((self._threshold == 1).all())
        """Whether every key gets a row when it is first seen."""
        self._pending = PendingCounts(layout, place_of, slot_of)
        self._filter = CountingFilter(layout)

    def due(self, slots: Int32, keys: Int64, todo: Int32) -> tuple[Int32, Any]:
        """Of the missing keys numbered in `todo`, those that are due to be admitted, and what to count: nothing is counted."""
        if not (len(self._pending) or (self._threshold[slots[todo]] > 1).any()):
            return todo, None
        if len(self._filter.counters):
            counted = todo[self._threshold[slots[todo]] > 1]
            counters, least = self._filter.counted(slots[counted], keys[counted])
            due = np.ones(len(todo), np.bool_)
            due[self._threshold[slots[todo]] > 1] = least >= self._threshold[slots[counted]]
            return todo[due], counters if len(counted) else None
        which, first = group(self._place_of, slots[todo], keys[todo])
        unique = todo[first]
        counts = np.bincount(which, minlength=len(first)) + self._pending.get(slots[unique], keys[unique])
        is_due = counts >= self._threshold[slots[unique]]
        return todo[is_due[which]], (unique, counts, is_due)

    def count(self, slots: Int32, keys: Int64, todo: Int32, now_ms: int, room: int) -> tuple[Int32, int]:
        """Count the occurrences of missing keys, numbered in `todo`; those that are due, the first `room` keys of them, and how
        many keys that left out."""
        due, counted = self.due(slots, keys, todo)
        refused = np.zeros(0, np.int32)
        if len(due) > room:
            which, first = group(self._place_of, slots[due], keys[due])
            due, refused = due[which < room], due[first[room:]]
        if counted is None:
            return due, len(refused)
        if len(self._filter.counters):
            self._filter.set(counted, now_ms)
            return due, len(refused)
        unique, counts, is_due = counted
        late = np.isin(unique, refused) & (self._threshold[slots[unique]] > 1)
        wait, admitted = unique[~is_due | late], unique[is_due & ~late]
        self._pending.put(slots[wait], keys[wait], counts[~is_due | late], np.full(len(wait), now_ms, np.int64))
        self._pending.remove(slots[admitted], keys[admitted])
        return due, len(refused)

    @property
    def num_counted(self) -> int:
        """Keys that are counted one by one."""
        return len(self._pending)

    def forget(self, slots: Int32, keys: Int64) -> None:
        """They have a row now."""
        self._pending.remove(slots, keys)

    def expire(self, cutoff_ms: Int64, now_ms: int) -> None:
        """Forget counts not seen since their slot's cutoff; those of a filter fade with time."""
        self._pending.expire(cutoff_ms)
        self._filter.halve(now_ms)

    def export(self, window: int) -> Pending:
        """All counts, and where the next windows begin; that of rows is the table's."""
        windows = np.array([window, self._pending.windows.at])
        return replace(self._filter.add_to(self._pending.export()), windows=windows)

    def restore(self, pending: Pending, slots: Int32, keys: Int64) -> None:
        """Replace all counts. ValueError for a filter of another size."""
        check_sketch(self._layout, pending)
        self._filter.restore(pending)
        self._pending = PendingCounts(self._layout, self._place_of, self._slot_of)
        self._pending.put(slots, keys, pending.counts, pending.last_seen_ms)
        self._pending.windows.at = int(pending.windows[1])

    def memory_bytes(self) -> int:
        return self._pending.memory_bytes() + int(self._filter.counters.nbytes)
