"""Rows by key: an open-addressing table of row numbers over a column that holds the keys. 8 bytes a row on average."""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.compiled import compiled
from recsys.types import Int32, Int64

_MIX = 0x9E3779B97F4A7C15
"""Fibonacci hashing (Knuth 6.4): the top bits of key × 2^64/φ, spread also for keys that count up."""
_MASK = 2**64 - 1
_EMPTY, _REMOVED = -1, -2
"""Places without a row: where a search ends, and where it goes on."""


@compiled
def _find(table: Any, keys: Any, wanted: Any, shift: Any, out: Any) -> None:
    last = len(table) - 1
    for n in range(len(wanted)):
        at = (np.uint64(wanted[n]) * np.uint64(_MIX)) >> np.uint64(shift)
        place = np.int64(at)
        while table[place] != _EMPTY and (table[place] == _REMOVED or keys[table[place], 0] != wanted[n]):
            place = (place + 1) & last
        out[n] = table[place]


@compiled
def _fill(table: Any, keys: Any, rows: Any, shift: Any) -> int:
    """Place rows; how many places that takes which were empty."""
    last, used = len(table) - 1, 0
    for n in range(len(rows)):
        place = np.int64((np.uint64(keys[rows[n], 0]) * np.uint64(_MIX)) >> np.uint64(shift))
        while table[place] >= 0:
            place = (place + 1) & last
        used += table[place] == _EMPTY
        table[place] = rows[n]
    return used


@compiled
def _remove(table: Any, keys: Any, rows: Any, shift: Any) -> None:
    last = len(table) - 1
    for n in range(len(rows)):
        place = np.int64((np.uint64(keys[rows[n], 0]) * np.uint64(_MIX)) >> np.uint64(shift))
        while table[place] != rows[n]:
            place = (place + 1) & last
        table[place] = _REMOVED


class RowIndex:
    """Rows by the key in their first column. One writer; readers beside it find a row once it was added."""

    def __init__(self, keys: Int64) -> None:
        self._count = self._used = 0
        """Rows, and places that are not empty."""
        self._place(np.full(2**11, _EMPTY, np.int32), keys)

    def _place(self, table: Int32, keys: Int64) -> None:
        """Readers see table and keys together: no row of a table lies beyond its keys."""
        self._table, self._keys, self._shift = table, keys, 65 - len(table).bit_length()
        self._parts: tuple[Int32, Any, Int64, int] = table, table.data, keys, self._shift

    def find(self, key: int) -> int:
        """The row of a key; -1: there is none."""
        table, cells, keys, shift = self._parts
        last, place = len(table) - 1, ((key * _MIX) & _MASK) >> shift
        while (row := cells[place]) != _EMPTY and (row < 0 or keys.item(row, 0) != key):
            place = (place + 1) & last
        return int(row)

    def find_all(self, wanted: Int64) -> Int32:
        """The rows of keys [n]; -1 where there is none."""
        table, _, keys, shift = self._parts
        found = np.empty(len(wanted), np.int32)
        _find(table, keys, wanted, shift, found)
        return found

    def add(self, keys: Int64, rows: Int32) -> None:
        """More rows, whose keys are in `keys`[rows, 0] already and in no other row."""
        self._count += len(rows)
        table = self._table
        if 3 * (self._used + len(rows)) > 2 * len(table):
            bits = max(11, int(np.ceil(np.log2(2 * self._count))))
            table = np.full(2**bits, _EMPTY, np.int32)
            self._used = _fill(table, keys, self._table[self._table >= 0], 64 - bits)
            self._place(table, keys)
        elif keys is not self._keys:
            self._place(table.copy(), keys)
        self._used += _fill(self._table, keys, rows, self._shift)

    def remove(self, rows: Int32) -> None:
        """Their keys are not found any more. Their places count as used until the table is made anew."""
        self._count -= len(rows)
        _remove(self._table, self._keys, rows, self._shift)
