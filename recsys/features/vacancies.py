"""When the row of a deleted item may become another item's: once nobody can hold it any more.

A row is left (its item was deleted), then given up (its item is not found any more, and nothing is kept by the row), then free.
Between two of these steps everybody ends who was reading when the first happened: no reader ever sees two items in one row.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from recsys.types import Int32


class Readers:
    """Who may hold row numbers. Thread-safe."""

    def __init__(self) -> None:
        self._tickets = itertools.count(1)
        self._open: dict[int, None] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Rows that are found in here keep their items until its end."""
        ticket = next(self._tickets)
        self._open[ticket] = None
        try:
            yield
        finally:
            del self._open[ticket]

    def now(self) -> int:
        """A point in time, to ask `ended` about."""
        return next(self._tickets)

    def ended(self, point: int) -> bool:
        """Whether everybody has ended who was reading at that point."""
        return min(list(self._open), default=point + 1) > point


class Vacancies:
    """Rows of deleted items on their way to new ones. One writer."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._left: OrderedDict[int, int] = OrderedDict()
        """Rows of deleted items, and when it was, the longest ago first."""
        self._resting: deque[tuple[int, list[int]]] = deque()
        self._free: list[int] = []

    @property
    def num_left(self) -> int:
        """Deleted items that are still found."""
        return len(self._left)

    @property
    def num_without(self) -> int:
        """Rows without an item that is found."""
        return len(self._free) + sum(len(rows) for _, rows in self._resting)

    def leave(self, row: int) -> None:
        """Its item was deleted."""
        self._left[row] = self._readers.now()

    def revive(self, row: int) -> None:
        """Its item is there again."""
        self._left.pop(row, None)

    def give_up(self, keep: int) -> Int32:
        """Those left the longest, beyond `keep`: their items are not to be found any more. `rest` follows."""
        rows: list[int] = []
        while len(self._left) > keep:
            row, point = next(iter(self._left.items()))
            if not self._readers.ended(point):
                break
            del self._left[row]
            rows.append(row)
        return np.array(rows, np.int32)

    def rest(self, rows: Int32) -> None:
        """Nothing is kept by these rows any more; who reads now may still hold them."""
        self._resting.append((self._readers.now(), rows.tolist()))

    def rested(self) -> list[int]:
        """Rows that nobody can hold any more, once each. `free` follows."""
        rows: list[int] = []
        while self._resting and self._readers.ended(self._resting[0][0]):
            rows += self._resting.popleft()[1]
        return rows

    def free(self, row: int) -> None:
        """The row is empty."""
        heapq.heappush(self._free, row)

    def take(self) -> int | None:
        """An empty row for a new item, the lowest; None: there is none."""
        return heapq.heappop(self._free) if self._free else None
