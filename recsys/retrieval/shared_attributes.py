"""Followed: the best items of the attribute values that a user engaged with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from recsys.retrieval import attribute_kernels as kernels
from recsys.retrieval.filed_values import NEWEST, FiledValues, Popularity, Ranked, Value
from recsys.retrieval.select import NO_ROWS, among, best, best_first, largest, tally
from recsys.types import Bool, Float32, Int32, Int64

_POPULAR = 200
"""Items kept of a value by popularity: half hides good ones of broad values, double costs query time and memory."""
_SORTED_ANEW = 50
"""A value is sorted anew once a fiftieth of its items was noted: sorting after each note took a millisecond of each request."""

_DEEP = 5000
"""Of a value's items by popularity that are looked at where too few of those above may be shown: half starves narrow filters, double
takes twice the time."""
_DEEP_EVERY = 20_000
"""Notes and changes after which these are found anew: it takes some milliseconds of a million items."""

_BEHIND = np.int64(2**32)
"""Behind every row."""
_EVERY = np.zeros(0, np.bool_)


class Followed:
    """An inverted index from (attribute index, key) to rows. One writer beside many readers.

    A value knows its 200 most popular items exactly, and its 50 newest; their order may miss its latest notes, as many as a
    fiftieth of its items. Where many of them were deleted, those that fell out earlier come back. A query looks at no more than 450 rows a
    value, and at its 5,000 most popular where too few of these may be shown.
    """

    def __init__(self) -> None:
        self._filed, self._popularity = FiledValues(), Popularity()
        self._changes = 0
        self._room = np.zeros(0, np.uint8), np.zeros(0)
        """Zeros for every row, for a query to add in."""
        self._lock = threading.Lock()

    def upsert(self, row: int, keys: Sequence[Iterable[int]]) -> None:
        """File `row` under `keys[attribute index]`; what it was filed under before is replaced. Newness counts from the first time."""
        with self._lock:
            self._changes += 1
            before = self._filed.of(row)
            values = [self._filed.made((a, key)) for a, ks in enumerate(keys) for key in dict.fromkeys(ks)]
            self._filed.file(row, values)
            for value in values:
                if value not in before:
                    value.cut |= len(value.newest) == NEWEST
                    value.newest.appendleft(row)
                    value.size += 1
                    value.ranked = None
                    if self._popularity.has(row):
                        self._note(value, row)
            for value in before:
                if value not in values:
                    self._leave(value, row)

    def load(self, filed: Sequence[tuple[Int32, Int64]]) -> None:
        """File many rows at once into an empty index: for each attribute index, rows and keys [n], rows in order of age."""
        with self._lock:
            for value, rows in self._filed.load(filed):
                value.size = len(rows)
                value.cut = value.size > NEWEST
                value.newest.extend(rows[-NEWEST:][::-1].tolist())

    def delete(self, row: int) -> None:
        """Take `row` out; unknown rows are ignored. Its popularity stays, for when it comes back."""
        with self._lock:
            self._changes += 1
            values = self._filed.of(row)
            if values:
                self._filed.file(row, ())
            for value in values:
                self._leave(value, row)

    def forget_rows(self, rows: Int32) -> None:
        """These rows, whose items were deleted, will be other items': what was noted of them is gone."""
        with self._lock:
            self._popularity.forget(rows)

    def _leave(self, value: Value, row: int) -> None:
        value.size -= 1
        value.ranked = None
        value.gone += row in value.popular
        value.popular.pop(row, None)
        value.order = None
        if row in value.newest:
            value.newest.remove(row)
        if not value.size:
            self._filed.drop(value)
        elif value.cut and (value.gone >= _POPULAR // 2 or len(value.newest) < min(value.size, NEWEST // 2)):
            self._refill(value)

    def _refill(self, value: Value) -> None:
        """Both lists anew, from all of the value's items."""
        rows = self._filed.under(value, self._filed.every_row())
        noted = rows[self._popular_first(rows)][:_POPULAR]
        value.popular = dict.fromkeys(noted[self._popularity.of(noted) > 0].tolist())
        value.newest = deque([*dict.fromkeys([*value.newest, *rows[::-1].tolist()])][:NEWEST], maxlen=NEWEST)
        value.ranked, value.order, value.gone = None, None, 0
        value.cut = value.size > len({*value.popular, *value.newest})

    def _popular_first(self, rows: Int32) -> npt.NDArray[np.intp]:
        return largest(self._popularity.of(rows), _DEEP)

    def note(self, row: int, amount: float = 1.0) -> None:
        """Add to the popularity of `row`, whether it is filed yet or not."""
        with self._lock:
            self._popularity.note(row, amount)
            for value in self._filed.of(row):
                self._note(value, row)

    def _note(self, value: Value, row: int) -> None:
        value.noted += 1
        if row in value.popular:
            return
        value.popular[row] = None
        if value.order is not None:  # else nobody asks for what was added
            value.added.append(row)
        if len(value.popular) > 2 * _POPULAR:
            value.cut, value.order = True, None
            value.popular = dict.fromkeys(self._by_popularity(value)[:_POPULAR].tolist())

    def _by_popularity(self, value: Value) -> Int32:
        rows = np.fromiter(value.popular, np.int32, len(value.popular))
        kernels.popular_first(rows, self._popularity.sums)
        return rows

    def _ranked(self, value: Value) -> Int32:
        """The value's list: its popular items in order, and then the newest of the others."""
        if value.ranked is None or value.noted * _SORTED_ANEW > len(value.popular):
            if (popular := value.order) is None:
                popular = self._by_popularity(value)
            elif value.added:
                popular = np.concatenate([popular, np.array(value.added, np.int32)])
            newest = np.fromiter(value.newest, np.int32, len(value.newest))
            value.ranked = kernels.ranked(popular, self._popularity.sums, newest)
            value.noted, value.populars, value.added = 0, len(popular), []
            value.order = value.ranked[: len(popular)]
        return value.ranked

    def _deeper(self, value: Value, allowed: Bool | None) -> Ranked:
        """A value's rows in order and what each place is worth: of what is allowed where that is little, else of its most popular."""
        if allowed is not None and np.count_nonzero(allowed) <= _DEEP:
            rows = self._filed.under(value, np.flatnonzero(allowed).astype(np.int32))
            rows = rows[self._popular_first(rows)]
        else:
            age = self._popularity.notes + self._changes
            if age - value.deep_at >= _DEEP_EVERY or not len(value.deep):
                rows = self._filed.under(value, self._filed.every_row())
                value.deep, value.deep_at = rows[self._popular_first(rows)], age
            rows = self._filed.under(value, value.deep)
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
        missing = NO_ROWS if left_out is None else left_out
        with self._lock:
            values = [(value, weight) for a, key, weight in keys if (value := self._filed.get((a, key)))]
            rows, scores, known = self._at_hand(values, allowed, missing)
            if len(rows) < min(k, known) and any(value.cut for value, _ in values):
                more, theirs = _blend([(*self._deeper(value, allowed), weight) for value, weight in values])
                new = among(np.where(np.isin(more, rows), -1, more), allowed, left_out)
                order = np.concatenate([rows, more[new] + _BEHIND])  # of equals those at hand come first
                rows, scores = np.concatenate([rows, more[new]]), np.concatenate([scores, theirs[new]])
                first = best(order, scores, k)
                return rows[first], scores[first].astype(np.float32)
        count = best_first(rows, scores, k)
        return rows[:count], scores[:count].astype(np.float32)

    def _at_hand(
        self, values: Sequence[tuple[Value, float]], allowed: Bool | None, missing: Int32
    ) -> tuple[Int32, npt.NDArray[np.float64], int]:
        """What the values' lists say of their rows, of those that may be shown; and how many rows they have."""
        if len(self._room[0]) < self._filed.num_rows:
            self._room = np.zeros(self._filed.num_rows, np.uint8), np.zeros(self._filed.num_rows)
        lists = [self._ranked(value) for value, _ in values]
        sizes = np.array(
            [(len(rows), value.populars) for rows, (value, _) in zip(lists, values, strict=True)], np.int64
        )
        weights = np.array([weight for _, weight in values], np.float64)
        mask, rows = _EVERY if allowed is None else allowed, np.concatenate([NO_ROWS, *lists])
        found: tuple[Int32, npt.NDArray[np.float64], int] = kernels.blended(
            (rows, sizes.reshape(-1, 2)), weights, self._room, mask, allowed is not None, missing
        )
        return found


def _blend(found: Sequence[tuple[Int32, npt.NDArray[np.float64], float]]) -> Ranked:
    """The rows of some values, and their worth in all of these together."""
    if not found:
        return np.zeros(0, np.int32), np.zeros(0)
    return tally(np.concatenate([rows for rows, _, _ in found]), np.concatenate([weight * w for _, w, weight in found]))


def warm_up() -> None:
    """Compile, or load from the cache: not in the first request."""
    some = Followed()
    for row in (0, 1):
        some.upsert(row, [[0]])
    some.note(0)
    some.query([(0, 0, 1.0)], 1)
    kernels.popular_first(np.zeros(1, np.int32), np.zeros(1))
