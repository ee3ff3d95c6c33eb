"""One generation's index, and what changed since: the exact buffer beside it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from recsys.retrieval.item_index import ItemIndex, unit
from recsys.retrieval.select import among, best, largest
from recsys.types import Bool, Float32, Int32, UInt8


class Searcher:
    """One generation's index, and what changed since: new, changed and recently touched rows are compared exactly.

    One writer beside many readers. What was put is found by the next search; what was deleted is not. Beyond `limit` the
    rows longest untouched leave the buffer: the index serves its own version of them, and `dropped` counts those it lacks.
    """

    def __init__(self, index: ItemIndex, limit: int = 50_000) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._index = index
        self._limit = limit
        self._positions = np.full(int(index.rows.max(initial=-1)) + 1, -1, np.int32)
        self._positions[index.rows] = np.arange(len(index), dtype=np.int32)
        self._searchable = np.packbits(np.ones(len(index), np.bool_), bitorder="little")
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._buffer_rows = np.full(16, -1, np.int32)
        self._buffer = np.zeros((16, index.dim + (index.hubs is not None)), np.float32)
        self._free: list[int] = []
        self._lock = threading.Lock()
        self.dropped = 0
        """Rows that left the full buffer and are not in the index: build a new generation."""

    @property
    def num_buffered(self) -> int:
        return len(self._slots)

    def put(self, rows: Int32, vectors: Float32) -> None:
        """Insert or replace vectors [n, D]; a deleted row lives again."""
        vectors = unit(vectors, rows)
        if vectors.shape[1] != self._index.dim:
            raise ValueError(
                f"vectors are {vectors.shape[1]} wide, the index {self._index.dim}: one generation, one tower"
            )
        if self._index.hubs is not None:
            vectors = self._index.hubs.corrected(vectors)
        with self._lock:
            for row, vector in zip(np.asarray(rows).tolist(), vectors, strict=True):
                self._mask(row, searchable=False)
                slot = self._slots.pop(row, -1)
                if slot < 0:
                    slot = self._slot()
                self._slots[row] = slot
                self._buffer[slot] = vector
                self._buffer_rows[slot] = row

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        used = len(self._slots)
        if used >= self._limit:
            row, slot = self._slots.popitem(last=False)
            self.dropped += not self._mask(row, searchable=True)
            return slot
        if used == len(self._buffer_rows):
            self._buffer_rows = np.concatenate([self._buffer_rows, np.full(used, -1, np.int32)])
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        return used

    def _mask(self, row: int, *, searchable: bool) -> bool:
        """Show or hide the index's version of a row; False when it has none."""
        position = int(self._positions[row]) if row < len(self._positions) else -1
        if position < 0:
            return False
        bit = np.uint8(1 << (position & 7))
        if searchable:
            self._searchable[position >> 3] |= bit
        else:
            self._searchable[position >> 3] &= ~bit
        return True

    def delete(self, row: int) -> None:
        """Take `row` out of every later search, until it is put again. The index's version of it is never shown again: the row may be
        another item's by then."""
        with self._lock:
            if self._mask(row, searchable=False):
                self._positions[row] = -1
            slot = self._slots.pop(row, -1)
            if slot >= 0:
                self._buffer_rows[slot] = -1
                self._free.append(slot)

    def search(
        self, vector: Float32, k: int, exclude: Collection[int] | Int32 = (), allowed: Bool | None = None
    ) -> tuple[Int32, Float32]:
        """The k best rows for a vector [D] and their cosines, best first, ties by row; never one in `exclude`.

        Vectors [K, D], a user's interests: a row's score is the best that it has with any of them. `allowed` [rows]: only rows
        that are set; those beyond its end are not. Neither starves the result: they are left out of the search, not of its answer.
        Fewer when there are no more; none for an all-zero vector (an untrained user). ValueError for NaN or another width.
        """
        vector = np.asarray(vector, np.float32)
        if vector.ndim == 2:
            return _merged([self.search(one, k, exclude, allowed) for one in vector], k)
        norm = float(np.linalg.norm(vector))
        if vector.shape != (self._index.dim,) or not np.isfinite(norm):
            raise ValueError(
                f"user vector has shape {vector.shape} and norm {norm}: give {self._index.dim} finite numbers"
            )
        if norm == 0.0 or k <= 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        vector = self._index.query(vector / np.float32(norm))
        excluded = exclude if isinstance(exclude, np.ndarray) else np.fromiter(exclude, np.int32, len(exclude))
        searchable = self._without(excluded)
        if allowed is None:
            positions, scores = self._index.search(vector, k, searchable)
        else:
            positions, scores = self._index.search_among(vector, k, self._wanted(searchable, allowed))
        with self._lock:
            # A row may have moved between index and buffer since: look again.
            shown = (self._searchable[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 1
            used = len(self._slots) + len(self._free)
            near = self._buffer[:used] @ vector
            buffered = self._buffer_rows[:used].copy()
        kept = among(buffered, allowed, excluded)
        rows = np.concatenate([self._index.rows[positions[shown]], buffered[kept]])
        scores = np.concatenate([scores[shown], near[kept]])
        first = best(rows, scores, k)
        return rows[first], scores[first]

    def _without(self, excluded: Int32) -> UInt8:
        """The bits of the positions to search."""
        if not len(excluded):
            return self._searchable
        positions = self._positions[excluded[(excluded >= 0) & (excluded < len(self._positions))]]
        positions = positions[positions >= 0]
        searchable = self._searchable.copy()
        np.bitwise_and.at(searchable, positions >> 3, ~(np.uint8(1) << (positions & 7).astype(np.uint8)))
        return searchable

    def _wanted(self, searchable: UInt8, allowed: Bool) -> Bool:
        """Which positions [N] are both searchable and of an allowed row."""
        if len(allowed) < len(self._positions):
            allowed = np.concatenate([allowed, np.zeros(len(self._positions) - len(allowed), np.bool_)])
        wanted: Bool = np.unpackbits(searchable, count=len(self._index), bitorder="little").view(np.bool_)
        wanted &= allowed.take(self._index.rows)
        return wanted


def _merged(found: list[tuple[Int32, Float32]], k: int) -> tuple[Int32, Float32]:
    """The k best of several lists, each row with its best score."""
    rows, where = np.unique(np.concatenate([rows for rows, _ in found]), return_inverse=True)
    scores = np.full(len(rows), -np.inf, np.float32)
    np.maximum.at(scores, where, np.concatenate([scores for _, scores in found]))
    first = largest(scores, k)
    return rows[first], scores[first]
