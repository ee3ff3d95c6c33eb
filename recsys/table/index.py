"""From (slot, key) to a row number: open addressing with linear probing, every 64-bit key legal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.table import kernels
from recsys.types import Float32, Int32, Int64

_MAX_LOAD = 0.7
"""Probes of a missing key: 6 at 0.7 and 13 at 0.8 (Knuth 6.4); an entry is 16 bytes."""
_NONE = np.empty((0, 0), np.float32)


class KeyIndex:
    """Rows `first`, `first + 1`, …, at most `capacity` of them; freed rows serve later keys. One writer.

    The row arrays are reserved in full and touched as rows come. Entries grow by building beside and swapping, so that
    a reader that holds the old ones still finds what it had.
    """

    def __init__(self, capacity: int, first: int = 0) -> None:
        self.first = first
        self.owner_slot = np.zeros(first + capacity, np.int32)
        self.owner_key = np.zeros(first + capacity, np.int64)
        self._free = np.zeros(capacity, np.int32)
        self._counters = np.array([first, 0], np.int64)
        self._entries = _empty(1024)

    def __len__(self) -> int:
        return int(self._counters[0] - self._counters[1]) - self.first

    @property
    def end(self) -> int:
        """One past the highest row ever used."""
        return int(self._counters[0])

    @property
    def index_bytes(self) -> int:
        return self._entries.nbytes

    def find(self, slots: Int32, keys: Int64, fallback: Int32, values: Float32 = _NONE, out: Float32 = _NONE) -> Int32:
        """Rows [N], `fallback[slot]` where missing; values gathered into `out`. ValueError for an unknown slot."""
        rows = np.empty(len(keys), np.int32)
        wrong = kernels.find(self._entries, slots, keys, fallback, rows, values, out)
        if wrong >= 0:
            raise ValueError(f"no slot {slots[wrong]}: the slots are {np.flatnonzero(fallback >= 0).tolist()}")
        return rows

    def reserve(self, extra: int) -> None:
        """Make sure that `extra` keys can be inserted without growing."""
        size = len(self._entries)
        while len(self) + extra > _MAX_LOAD * size:
            size *= 2
        if size != len(self._entries):
            entries = _empty(size)
            kernels.rebuild(entries, self.owner_slot, self.owner_key, self.first, self.end)
            self._entries = entries

    def insert(self, slots: Int32, keys: Int64) -> Int32:
        """Rows [N], made where missing, in order of first occurrence. `reserve` comes first."""
        rows = np.empty(len(keys), np.int32)
        kernels.insert(self._entries, self._free, self._counters, slots, keys, rows)
        self.owner_slot[rows] = slots
        self.owner_key[rows] = keys
        return rows

    def remove(self, slots: Int32, keys: Int64) -> tuple[Int32, Int32, Int64]:
        """Free the rows of the keys that are there; return those rows, slots and keys."""
        rows = np.empty(len(keys), np.int32)
        count = kernels.remove(self._entries, self._free, self._counters, slots, keys, rows)
        rows = rows[:count]
        removed_slots = self.owner_slot[rows]
        self.owner_slot[rows] = -1
        return rows, removed_slots, self.owner_key[rows]

    def live(self) -> npt.NDArray[np.intp]:
        """All rows in use."""
        return np.flatnonzero(self.owner_slot[self.first : self.end] >= 0) + self.first


def group(slots: Int32, keys: Int64) -> tuple[Int32, Int32, Int64]:
    """Which unique pair each pair is [N], and the unique slots and keys [U] in order of first occurrence."""
    scratch = KeyIndex(len(keys))
    scratch.reserve(len(keys))
    place = scratch.insert(slots, keys)
    return place, scratch.owner_slot[: len(scratch)], scratch.owner_key[: len(scratch)]


def _empty(size: int) -> Int64:
    return np.full((size, 2), kernels.EMPTY, np.int64)
