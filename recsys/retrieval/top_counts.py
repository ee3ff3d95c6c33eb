"""Trending: decayed counts of items, their top k exact at every instant."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from recsys.decay import ForwardDecay, counted
from recsys.retrieval.select import among, largest
from recsys.types import Bool, Float32, Int32

_Sums: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
_NOTHING = 2.0**-300
"""A stored sum below this is dropped at a rescale: more than a hundred half-lives old, whatever its size was."""


class _Watched:
    """The rows at or above the `top`-th largest sum as of some earlier instant, the bar; of equals the lowest rows."""

    def __init__(self, sums: _Sums, top: int) -> None:
        self._top = top
        self.bar, self._bar_row = _NOTHING, 0
        self.rows = array("i", np.flatnonzero(sums >= _NOTHING).astype(np.int32).tobytes())
        if len(self.rows) >= 2 * top:
            self._raise_bar(sums)

    @property
    def is_all(self) -> bool:
        """Whether nothing that was counted is below the bar."""
        return self.bar == _NOTHING and self._bar_row == 0

    @property
    def too_few(self) -> bool:
        """Whether others are among the largest now: so many have gone."""
        return len(self.rows) <= self._top // 2 and not self.is_all

    def enter(self, row: int, before: float, sums: _Sums) -> None:
        """A row's sum grew from `before`, to the bar or beyond."""
        if not self._is_above(before, row) and self._is_above(float(sums[row]), row):
            insort(self.rows, row)
            if len(self.rows) >= 2 * self._top:
                self._raise_bar(sums)

    def leave(self, row: int) -> None:
        """A row has no sum any more."""
        place = bisect_left(self.rows, row)
        if place < len(self.rows) and self.rows[place] == row:
            del self.rows[place]

    def _is_above(self, total: float, row: int) -> bool:
        return total > self.bar or (total == self.bar and row <= self._bar_row)

    def _raise_bar(self, sums: _Sums) -> None:
        rows = np.array(self.rows)
        kept = rows[largest(sums[rows], self._top)]
        self.bar, self._bar_row = float(sums[kept[-1]]), int(kept[-1])
        self.rows = array("i", np.sort(kept).tobytes())


class Trending:
    """Decayed counts by row, one writer beside many readers.

    Stored sums only grow, so an item enters the `top` largest only by its own `add`: it suffices to watch those that were there.
    Memory is 9 bytes a catalogue row. Rows that are `buried` are not among the largest, and keep their sums until they come back.
    """

    def __init__(self, half_life_s: float, top: int = 1000) -> None:
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        self._decay = ForwardDecay(half_life_s)
        self._top = top
        self._lock = threading.Lock()
        self._dead = bytearray(1024)
        self._buried: dict[int, float] = {}
        """Sums of rows that are dead, in place of those in `_sums`."""
        self._resize(np.zeros(1024))

    def _resize(self, sums: _Sums) -> None:
        self._sums = sums
        self._cells: Any = sums.data  # a memoryview: twice as fast as numpy for one element
        self._watched = _Watched(sums, self._top)

    def add(self, row: int, now_ms: int, weight: float = 1.0) -> None:
        """Count `row` once more (`weight` > 0). An older `now_ms` than before counts as what is left of it."""
        with self._lock:
            if (factor := self._decay.rescale(now_ms)) is not None:
                self._buried = {r: kept for r, s in self._buried.items() if (kept := s * factor) >= _NOTHING}
                self._resize(np.where(self._sums * factor < _NOTHING, 0.0, self._sums * factor))
            if row >= len(self._cells):
                self._grow(row + 1)
            weight *= self._decay.weight(now_ms)
            if self._dead[row]:
                self._buried[row] = self._buried.get(row, 0.0) + weight
            else:
                self._set(row, self._cells[row] + weight)

    def _set(self, row: int, after: float) -> None:
        before, self._cells[row] = self._cells[row], after
        if before <= self._watched.bar <= after:
            self._watched.enter(row, before, self._sums)

    def bury(self, rows: Int32) -> None:
        """These rows' items are deleted: others take their places."""
        with self._lock:
            if len(rows) and int(rows.max()) >= len(self._sums):
                self._grow(int(rows.max()) + 1)
            for row in rows.tolist():
                self._dead[row] = 1
                if total := self._cells[row]:
                    self._buried[row] = total
                    self._drop(row)
            self._refill()

    def _drop(self, row: int) -> None:
        self._cells[row] = 0.0
        self._watched.leave(row)

    def _refill(self) -> None:
        if self._watched.too_few:
            self._resize(self._sums)

    def revive(self, row: int) -> None:
        """A row's item is there again."""
        with self._lock:
            if row < len(self._dead) and self._dead[row]:
                self._dead[row] = 0
                if total := self._buried.pop(row, 0.0):
                    self._set(row, total)

    def _grow(self, size: int) -> None:
        sums = np.zeros(max(size, 2 * len(self._sums)))
        sums[: len(self._sums)] = self._sums
        self._dead.extend(bytes(len(sums) - len(self._sums)))
        self._sums, self._cells = sums, sums.data

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': what was counted of them is gone."""
        with self._lock:
            rows = rows[rows < len(self._sums)]
            for row in rows.tolist():
                self._dead[row] = 0
                self._buried.pop(row, None)
                self._drop(row)
            self._refill()

    def top(
        self, k: int, now_ms: int, allowed: Bool | None = None, left_out: Int32 | None = None
    ) -> tuple[Int32, Float32]:
        """The k largest, best first, ties by row: rows [k] and their counts decayed to `now_ms`.

        Those among the watched ones are at hand; where so many of these are not allowed, or left out, that fewer than k remain, every
        row that ever was counted is looked at.
        """
        with self._lock:
            rows = np.array(self._watched.rows, np.int32)
            if allowed is not None or left_out is not None:
                rows = rows[among(rows, allowed, left_out)]
            if len(rows) < k and not self._watched.is_all:
                every = np.flatnonzero(self._sums >= _NOTHING)
                rows = every[among(every, allowed, left_out)].astype(np.int32)
            sums = self._sums[rows]
            decay = self._decay.decay(now_ms)
        first = largest(sums, k)  # rows ascend: ties by row
        return rows[first], (sums[first] * decay).astype(np.float32)

    def score(self, rows: Int32, now_ms: int) -> Float32:
        """Counts decayed to `now_ms` [n]; 0 for a row never counted."""
        with self._lock:
            sums, decay = self._sums, self._decay.decay(now_ms)
            found = sums.take(rows, mode="clip")
        return np.where(rows < len(sums), found * decay, 0.0).astype(np.float32)

    def shares(self, rows: Int32, k: int, now_ms: int) -> Float32:
        """Each row's count in that of the k largest together [n]; 0 before anything is counted."""
        total = float(self.top(k, now_ms)[1].sum())
        return self.score(rows, now_ms) / np.float32(total) if total > 0 else np.zeros(len(rows), np.float32)

    def state(self) -> dict[str, Any]:
        """Everything, as arrays."""
        with self._lock:
            rows = np.flatnonzero(self._sums).astype(np.int32)
            buried = np.fromiter(self._buried, np.int32, len(self._buried))
            return {
                "clock": np.array(self._decay.state(), np.int64),
                "half_life_s": np.array([self._decay.half_life_ms / 1000]),
                "rows": np.concatenate([rows, buried]),
                "sums": np.concatenate([self._sums[rows], np.fromiter(self._buried.values(), np.float64, len(buried))]),
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32 | None = None, **times: int) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone; `times`: see `ForwardDecay.restore`. No row is buried."""
        rows, kept = mapped(state["rows"], row_map)
        sums = np.zeros(max(1024, int(rows.max(initial=-1)) + 1))
        sums[rows] = counted(state["sums"], "trending")[kept]
        with self._lock:
            self._dead, self._buried = bytearray(len(sums)), {}
            sums *= self._decay.restore(state["clock"].tolist(), half_life_of(state), **times)
            self._resize(np.where(sums < _NOTHING, 0.0, sums))


def half_life_of(state: Mapping[str, Any]) -> float | None:
    """What state was saved with; None where an earlier version did not say."""
    return float(state["half_life_s"][0]) if "half_life_s" in state else None


def mapped(rows: Int32, row_map: Int32 | None) -> tuple[Int32, Any]:
    """Today's rows of the rows that still exist, and the mask of those."""
    if row_map is None:
        return rows, np.ones(len(rows), np.bool_)
    known = (rows >= 0) & (rows < len(row_map))
    new = np.where(known, row_map[np.where(known, rows, 0)] if len(row_map) else -1, -1).astype(np.int32)
    return new[new >= 0], new >= 0
