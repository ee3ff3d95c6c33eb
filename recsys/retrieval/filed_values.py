"""Which rows are filed under which attribute values, and how popular rows are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay
from recsys.types import Int32, Int64

NEWEST = 50
"""Items kept of a value by age, popular or not."""
_HALF_LIFE_NOTES = 100_000
"""Popularity halves after this many notes: half follows a day's taste, double a season's."""

Ranked: TypeAlias = tuple[Int32, npt.NDArray[np.float64]]


class Value:
    """One attribute value: its items by popularity (the last 200 to 400 noted) and by age, newest first."""

    __slots__ = (
        *("added", "cut", "deep", "deep_at", "gone", "name", "newest", "noted"),
        *("number", "order", "popular", "populars", "ranked", "size"),
    )

    def __init__(self, name: tuple[int, int], number: int) -> None:
        self.name, self.number = name, number
        self.popular: dict[int, None] = {}
        self.newest: deque[int] = deque(maxlen=NEWEST)
        self.ranked: Int32 | None = None
        """Its popular items in order, `populars` of them, and then the newest of the others; None since one came or left."""
        self.populars = 0
        self.order: Int32 | None = None
        """Its popular items as they were ranked, without those that were `added` since; None since one left."""
        self.added: list[int] = []
        self.gone = 0
        """Popular items that left since the last time that all items were looked at."""
        self.cut = False
        """Whether items of it are in neither list."""
        self.deep, self.deep_at = np.zeros(0, np.int32), 0
        self.noted = 0
        """Notes since it was ranked."""
        self.size = 0


class FiledValues:
    """Values by (attribute index, key), and the numbers of each row's values. Not thread-safe."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], Value] = {}
        self._numbered: list[Value | None] = [None]
        self._free: list[int] = []
        self._filed = np.zeros((1024, 4), np.int32)
        """Numbers of each row's values, 4 bytes each; 0 after the last."""

    def get(self, name: tuple[int, int]) -> Value | None:
        """A value that some row has."""
        return self._values.get(name)

    def made(self, name: tuple[int, int]) -> Value:
        """A value, made where no row has it yet."""
        value = self._values.get(name)
        if value is None:
            number = self._free.pop() if self._free else len(self._numbered)
            value = self._values[name] = Value(name, number)
            if number == len(self._numbered):
                self._numbered.append(value)
            else:
                self._numbered[number] = value
        return value

    def drop(self, value: Value) -> None:
        """No row has it any more."""
        del self._values[value.name]
        self._numbered[value.number] = None
        self._free.append(value.number)

    def of(self, row: int) -> list[Value]:
        """What `row` is filed under."""
        if row >= len(self._filed):
            return []
        numbered = self._numbered
        return [value for number in self._filed[row].tolist() if (value := numbered[number]) is not None]

    def file(self, row: int, values: Sequence[Value]) -> None:
        """File `row` under these alone."""
        rows, width = self._filed.shape
        if row >= rows or len(values) > width:
            filed = np.zeros((max(row + 1, 2 * rows) if row >= rows else rows, max(width, len(values))), np.int32)
            filed[:rows, :width] = self._filed
            self._filed = filed
        self._filed[row] = 0
        self._filed[row, : len(values)] = [value.number for value in values]

    def load(self, filed: Sequence[tuple[Int32, Int64]]) -> Iterator[tuple[Value, Int64]]:
        """File many rows at once where none is: for each attribute index, rows and keys [n], rows in order of age. Each value
        and its rows, in that order."""
        assert not self._values, "only an empty index is loaded"
        pairs = [np.zeros(0, np.int64)]
        for attribute, (rows, keys) in enumerate(filed):
            names, which = np.unique(keys, return_inverse=True)
            numbers = np.array([self.made((attribute, key)).number for key in names.tolist()], np.int64)
            pairs.append((rows.astype(np.int64) << 32) | numbers[which] if len(rows) else pairs[0])
        every_pair = np.sort(np.concatenate(pairs))  # np.unique hashes: ten times slower where nearly all differ
        distinct = every_pair[np.diff(every_pair, prepend=-1) > 0]
        every, of = distinct >> 32, distinct & 0xFFFFFFFF
        places = np.arange(len(every)) - np.searchsorted(every, every)
        size = max(1024, int(every.max(initial=-1)) + 1)
        self._filed = np.zeros((size, max(4, int(places.max(initial=-1)) + 1)), np.int32)
        self._filed[every, places] = of
        order = np.argsort(of, kind="stable")
        ends = np.cumsum(np.bincount(of, minlength=len(self._numbered))).tolist()
        for value in self._values.values():
            yield value, every[order[ends[value.number - 1] : ends[value.number]]]

    @property
    def num_rows(self) -> int:
        """Rows that there is room for."""
        return len(self._filed)

    def every_row(self) -> Int32:
        """All rows that there is room for."""
        return np.arange(len(self._filed), dtype=np.int32)

    def under(self, value: Value, rows: Int32) -> Int32:
        """Those of the rows that are filed under a value."""
        rows = rows[rows < len(self._filed)]
        return rows[(self._filed[rows] == value.number).any(1)]


class Popularity:
    """Decayed sums of notes by row. Not thread-safe."""

    def __init__(self) -> None:
        self.sums = np.zeros(1024)
        """By row, in units of the decay; rows beyond its end have none."""
        self._decay = ForwardDecay(_HALF_LIFE_NOTES / 1000)  # its clock counts notes
        self.notes = 0

    def note(self, row: int, amount: float) -> None:
        """Add to what a row has."""
        self.notes += 1
        if (factor := self._decay.rescale(self.notes)) is not None:
            self.sums *= factor
        if row >= len(self.sums):
            grown = np.zeros(max(row + 1, 2 * len(self.sums)))
            grown[: len(self.sums)] = self.sums
            self.sums = grown
        self.sums[row] += amount * self._decay.weight(self.notes)

    def has(self, row: int) -> bool:
        """Whether a row was ever noted."""
        return row < len(self.sums) and bool(self.sums[row])

    def of(self, rows: Int32) -> npt.NDArray[np.float64]:
        """What rows have [n]."""
        known = rows < len(self.sums)
        return np.where(known, self.sums[np.where(known, rows, 0)], 0.0)

    def forget(self, rows: Int32) -> None:
        """Take away what these have."""
        self.sums[rows[rows < len(self.sums)]] = 0.0
