"""Followed: the best items of the attribute values that a user engaged with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from recsys.retrieval.filed_values import NEWEST, FiledValues, Popularity, Ranked, Value
from recsys.retrieval.select import among, best, largest, tally
from recsys.types import Bool, Float32, Int32, Int64

_POPULAR = 200
"""Items kept of a value by popularity: half hides good ones of broad values, double costs query time and memory."""
_NEWEST_EVERY = 4
"""Every fourth place of a value belongs to its newest items, so that new ones get a chance beside popular ones."""
_SORTED_ANEW = 50
"""A value is sorted anew once a fiftieth of its items was noted: sorting after each note took a millisecond of each request."""

_DEEP = 5000
"""Of a value's items by popularity that are looked at where too few of those above may be shown: half starves narrow filters, double
takes twice the time."""
_DEEP_EVERY = 20_000
"""Notes and changes after which these are found anew: it takes some milliseconds of a million items."""

_BEHIND = np.int64(2**32)
"""Behind every row."""


class Followed:
    """An inverted index from (attribute index, key) to rows. One writer beside many readers.

    A value knows its 200 most popular items exactly, and its 50 newest; their order may miss its latest notes, as many as a
    fiftieth of its items. Where many of them were deleted, those that fell out earlier come back. A query looks at no more than 450 rows a
    value, and at its 5,000 most popular where too few of these may be shown.
    """

    def __init__(self) -> None:
        self._filed, self._popularity = FiledValues(), Popularity()
        self._changes = 0
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
        value.ranked, value.gone = None, 0
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
        value.popular[row] = None
        value.noted += 1
        if len(value.popular) > 2 * _POPULAR:
            value.cut = True
            value.popular = dict.fromkeys(self._by_popularity(value)[:_POPULAR].tolist())

    def _by_popularity(self, value: Value) -> Int32:
        rows = np.fromiter(value.popular, np.int32, len(value.popular))
        return self._popularity.ordered(rows)

    def _ranked(self, value: Value) -> Ranked:
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

    def _deeper(self, value: Value, allowed: Bool | None) -> Ranked:
        """Like `_ranked`, of what is allowed where that is little, else of the value's most popular."""
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
        with self._lock:
            values = [(value, weight) for a, key, weight in keys if (value := self._filed.get((a, key)))]
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


def _blend(found: Sequence[tuple[Int32, npt.NDArray[np.float64], float]]) -> Ranked:
    """The rows of some values, and their worth in all of these together."""
    if not found:
        return np.zeros(0, np.int32), np.zeros(0)
    return tally(np.concatenate([rows for rows, _, _ in found]), np.concatenate([weight * w for _, w, weight in found]))
