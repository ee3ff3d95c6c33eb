"""Followed: the best items of the attribute values that a user engaged with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay
from recsys.retrieval.select import among, best, largest, tally
from recsys.types import Bool, Float32, Int32, Int64

_POPULAR = 200
"""Items kept of a value by popularity: half hides good ones of broad values, double costs query time and memory."""
_NEWEST = 50
"""Items kept of a value by age, popular or not."""
_NEWEST_EVERY = 4
"""Every fourth place of a value belongs to its newest items, so that new ones get a chance beside popular ones."""
_HALF_LIFE_NOTES = 100_000
"""Popularity halves after this many notes: half follows a day's taste, double a season's."""
_SORTED_ANEW = 50
"""A value is sorted anew once a fiftieth of its items was noted: sorting after each note took a millisecond of each request."""

_DEEP = 5000
"""Of a value's items by popularity that are looked at where too few of those above may be shown: half starves narrow filters, double
takes twice the time."""
_DEEP_EVERY = 20_000
"""Notes and changes after which these are found anew: it takes some milliseconds of a million items."""

_BEHIND = np.int64(2**32)
"""Behind every row."""
_Ranked: TypeAlias = tuple[Int32, npt.NDArray[np.float64]]


class _Value:
    """One attribute value: its items by popularity (the last `_POPULAR` to `2 _POPULAR` noted) and by age, newest first."""

    __slots__ = ("cut", "deep", "deep_at", "gone", "name", "newest", "noted", "number", "popular", "ranked", "size")

    def __init__(self, name: tuple[int, int], number: int) -> None:
        self.name, self.number = name, number
        self.popular: dict[int, None] = {}
        self.newest: deque[int] = deque(maxlen=_NEWEST)
        self.ranked: _Ranked | None = None
        self.gone = 0
        """Popular items that left since the last time that all items were looked at."""
        self.cut = False
        """Whether items of it are in neither list."""
        self.deep, self.deep_at = np.zeros(0, np.int32), 0
        self.noted = 0
        """Notes since it was ranked."""
        self.size = 0


class Followed:
    """An inverted index from (attribute index, key) to rows. One writer beside many readers.

    A value knows its 200 most popular items exactly, and its 50 newest; their order may miss its latest notes, as many as a
    fiftieth of its items. Where many of them were deleted, those that fell out earlier come back. A query looks at no more than 450 rows a
    value, and at its 5,000 most popular where too few of these may be shown.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], _Value] = {}
        self._numbered: list[_Value | None] = [None]
        self._free: list[int] = []
        self._filed = np.zeros((1024, 4), np.int32)
        """Numbers of each row's values, 4 bytes each; 0 after the last."""
        self._popularity = np.zeros(1024)
        self._decay = ForwardDecay(_HALF_LIFE_NOTES / 1000)  # its clock counts notes
        self._notes = self._changes = 0
        self._lock = threading.Lock()

    def _value(self, name: tuple[int, int]) -> _Value:
        value = self._values.get(name)
        if value is None:
            number = self._free.pop() if self._free else len(self._numbered)
            value = self._values[name] = _Value(name, number)
            if number == len(self._numbered):
                self._numbered.append(value)
            else:
                self._numbered[number] = value
        return value

    def _of(self, row: int) -> list[_Value]:
        """What `row` is filed under."""
        if row >= len(self._filed):
            return []
        found = (self._numbered[number] for number in self._filed[row].tolist())
        return [value for value in found if value is not None]

    def _file(self, row: int, values: Sequence[_Value]) -> None:
        rows, width = self._filed.shape
        if row >= rows or len(values) > width:
            filed = np.zeros((max(row + 1, 2 * rows) if row >= rows else rows, max(width, len(values))), np.int32)
            filed[:rows, :width] = self._filed
            self._filed = filed
        self._filed[row] = 0
        self._filed[row, : len(values)] = [value.number for value in values]

    def upsert(self, row: int, keys: Sequence[Iterable[int]]) -> None:
        """File `row` under `keys[attribute index]`; what it was filed under before is replaced. Newness counts from the first time."""
        with self._lock:
            self._changes += 1
            before = self._of(row)
            values = [self._value((a, key)) for a, ks in enumerate(keys) for key in dict.fromkeys(ks)]
            self._file(row, values)
            for value in values:
                if value not in before:
                    value.cut |= len(value.newest) == _NEWEST
                    value.newest.appendleft(row)
                    value.size += 1
                    value.ranked = None
                    if row < len(self._popularity) and self._popularity[row]:
                        self._note(value, row)
            for value in before:
                if value not in values:
                    self._leave(value, row)

    def load(self, filed: Sequence[tuple[Int32, Int64]]) -> None:
        """File many rows at once into an empty index: for each attribute index, rows and keys [n], rows in order of age."""
        with self._lock:
            assert not self._values, "only an empty index is loaded"
            pairs = [np.zeros(0, np.int64)]
            for attribute, (rows, keys) in enumerate(filed):
                names, which = np.unique(keys, return_inverse=True)
                numbers = np.array([self._value((attribute, key)).number for key in names.tolist()], np.int64)
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
                start, end = ends[value.number - 1], ends[value.number]
                value.size = end - start
                value.cut = value.size > _NEWEST
                value.newest.extend(every[order[max(start, end - _NEWEST) : end]][::-1].tolist())

    def delete(self, row: int) -> None:
        """Take `row` out; unknown rows are ignored. Its popularity stays, for when it comes back."""
        with self._lock:
            self._changes += 1
            values = self._of(row)
            if values:
                self._filed[row] = 0
            for value in values:
                self._leave(value, row)

    def forget_rows(self, rows: Int32) -> None:
        """These rows, whose items were deleted, will be other items': what was noted of them is gone."""
        with self._lock:
            self._popularity[rows[rows < len(self._popularity)]] = 0.0

    def _leave(self, value: _Value, row: int) -> None:
        value.size -= 1
        value.ranked = None
        value.gone += row in value.popular
        value.popular.pop(row, None)
        if row in value.newest:
            value.newest.remove(row)
        if not value.size:
            del self._values[value.name]
            self._numbered[value.number] = None
            self._free.append(value.number)
        elif value.cut and (value.gone >= _POPULAR // 2 or len(value.newest) < min(value.size, _NEWEST // 2)):
            self._refill(value)

    def _refill(self, value: _Value) -> None:
        """Both lists anew, from all of the value's items."""
        rows = self._all_of(value, np.arange(len(self._filed), dtype=np.int32))
        noted = rows[self._popular_first(rows)][:_POPULAR]
        value.popular = dict.fromkeys(noted[self._popularity_of(noted) > 0].tolist())
        value.newest = deque([*dict.fromkeys([*value.newest, *rows[::-1].tolist()])][:_NEWEST], maxlen=_NEWEST)
        value.ranked, value.gone = None, 0
        value.cut = value.size > len({*value.popular, *value.newest})

    def _all_of(self, value: _Value, rows: Int32) -> Int32:
        """Those of the rows that are filed under a value."""
        rows = rows[rows < len(self._filed)]
        return rows[(self._filed[rows] == value.number).any(1)]

    def _popularity_of(self, rows: Int32) -> npt.NDArray[np.float64]:
        known = rows < len(self._popularity)
        return np.where(known, self._popularity[np.where(known, rows, 0)], 0.0)

    def _popular_first(self, rows: Int32) -> npt.NDArray[np.intp]:
        return largest(self._popularity_of(rows), _DEEP)

    def note(self, row: int, amount: float = 1.0) -> None:
        """Add to the popularity of `row`, whether it is filed yet or not."""
        with self._lock:
            self._notes += 1
            if (factor := self._decay.rescale(self._notes)) is not None:
                self._popularity *= factor
            if row >= len(self._popularity):
                grown = np.zeros(max(row + 1, 2 * len(self._popularity)))
                grown[: len(self._popularity)] = self._popularity
                self._popularity = grown
            self._popularity[row] += amount * self._decay.weight(self._notes)
            for value in self._of(row):
                self._note(value, row)

    def _note(self, value: _Value, row: int) -> None:
        value.popular[row] = None
        value.noted += 1
        if len(value.popular) > 2 * _POPULAR:
            value.cut = True
            value.popular = dict.fromkeys(self._by_popularity(value)[:_POPULAR].tolist())

    def _by_popularity(self, value: _Value) -> Int32:
        rows = np.fromiter(value.popular, np.int32, len(value.popular))
        return rows[np.lexsort((rows, -self._popularity[rows]))]

    def _ranked(self, value: _Value) -> _Ranked:
        """The value's rows and what each place is worth: popular ones in order, every fourth place one of the newest."""
        if value.ranked is None or value.noted * _SORTED_ANEW > len(value.popular):
            value.noted = 0
            popular = self._by_popularity(value)
            newest = [row for row in value.newest if row not in value.popular]
            places = np.arange(len(popular))
            places += places // (_NEWEST_EVERY - 1)
            new_places = np.arange(1, len(newest) + 1) * _NEWEST_EVERY - 1
            rows = np.concatenate([popular, np.array(newest, np.int32)])
            value.ranked = rows, 1.0 / np.sqrt(1.0 + np.concatenate([places, new_places]))
        return value.ranked

    def _deeper(self, value: _Value, allowed: Bool | None) -> _Ranked:
        """Like `_ranked`, of what is allowed where that is little, else of the value's most popular."""
        if allowed is not None and np.count_nonzero(allowed) <= _DEEP:
            rows = self._all_of(value, np.flatnonzero(allowed).astype(np.int32))
            rows = rows[self._popular_first(rows)]
        else:
            if self._notes + self._changes - value.deep_at >= _DEEP_EVERY or not len(value.deep):
                rows = self._all_of(value, np.arange(len(self._filed), dtype=np.int32))
                value.deep, value.deep_at = rows[self._popular_first(rows)], self._notes + self._changes
            rows = self._all_of(value, value.deep)
        return rows, 1.0 / np.sqrt(1.0 + np.arange(len(rows)))

    def query(
        self,
        keys: Iterable[tuple[int, int, float]],
        k: int,
        allowed: Bool | None = None,
        left_out: Int32 | None = None,
    ) -> tuple[Int32, Float32]:
        """The k best (allowed) rows for weighted values (attribute index, key, weight), best first, ties by row.

        A row's score is Σ weight / √place over the values it has: heavy values give most, none takes everything, and who has
        several of them leads.
        """
        with self._lock:
            values = [(value, weight) for a, key, weight in keys if (value := self._values.get((a, key)))]
            rows, scores = _blend([(*self._ranked(value), weight) for value, weight in values])
            known, kept = len(rows), among(rows, allowed, left_out)
            rows, scores = rows[kept], scores[kept]
            order: Int32 | Int64 = rows
            if len(rows) < min(k, known) and any(value.cut for value, _ in values):
                more, theirs = _blend([(*self._deeper(value, allowed), weight) for value, weight in values])
                new = among(np.where(np.isin(more, rows), -1, more), allowed, left_out)
                order = np.concatenate([rows, more[new] + _BEHIND])  # of equals those at hand come first
                rows, scores = np.concatenate([rows, more[new]]), np.concatenate([scores, theirs[new]])
        first = best(order, scores, k)
        return rows[first], scores[first].astype(np.float32)


def _blend(found: Sequence[tuple[Int32, npt.NDArray[np.float64], float]]) -> _Ranked:
    """The rows of some values, and their worth in all of these together."""
    if not found:
        return np.zeros(0, np.int32), np.zeros(0)
    return tally(np.concatenate([rows for rows, _, _ in found]), np.concatenate([weight * w for _, w, weight in found]))
