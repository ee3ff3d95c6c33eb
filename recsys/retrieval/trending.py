"""Trending: decayed counts of items, their top k exact at every instant."""

from __future__ import annotations

import threading
from array import array
from bisect import insort
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay, counted
from recsys.types import Bool, Float32, Int32, Int64

_NOTHING = 2.0**-300
"""A stored sum below this is dropped at a rescale: more than a hundred half-lives old, whatever its size was."""


class Trending:
    """Decayed counts by row, one writer beside many readers.

    Stored sums only grow, so an item enters the `top` largest only by its own `add`: it suffices to watch the rows at or
    above the top-th largest sum as of some earlier instant, the bar. Memory is 8 bytes a catalogue row.
    """

    def __init__(self, half_life_s: float, top: int = 1000) -> None:
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        self._decay = ForwardDecay(half_life_s)
        self._top = top
        self._lock = threading.Lock()
        self._resize(np.zeros(1024))

    def _resize(self, sums: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        self._sums = sums
        self._cells: Any = sums.data  # a memoryview: twice as fast as numpy for one element
        self._bar, self._bar_row = _NOTHING, 0
        self._above = array("i", np.flatnonzero(sums >= _NOTHING).astype(np.int32).tobytes())
        if len(self._above) >= 2 * self._top:
            self._raise_bar()

    def add(self, row: int, now_ms: int, weight: float = 1.0) -> None:
        """Count `row` once more (`weight` > 0). An older `now_ms` than before counts as what is left of it."""
        with self._lock:
            if (factor := self._decay.rescale(now_ms)) is not None:
                self._resize(np.where(self._sums * factor < _NOTHING, 0.0, self._sums * factor))
            if row >= len(self._cells):
                self._grow(row + 1)
            before = self._cells[row]
            after = self._cells[row] = before + weight * self._decay.weight(now_ms)
            if before <= self._bar <= after and not self._is_above(before, row) and self._is_above(after, row):
                insort(self._above, row)
                if len(self._above) >= 2 * self._top:
                    self._raise_bar()

    def _is_above(self, total: float, row: int) -> bool:
        return total > self._bar or (total == self._bar and row <= self._bar_row)

    def _grow(self, size: int) -> None:
        sums = np.zeros(max(size, 2 * len(self._sums)))
        sums[: len(self._sums)] = self._sums
        self._sums, self._cells = sums, sums.data

    def _raise_bar(self) -> None:
        rows = np.array(self._above)
        kept = rows[largest(self._sums[rows], self._top)]
        self._bar, self._bar_row = float(self._sums[kept[-1]]), int(kept[-1])
        self._above = array("i", np.sort(kept).tobytes())

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': what was counted of them is gone."""
        with self._lock:
            rows = rows[rows < len(self._sums)]
            rows = rows[self._sums[rows] > 0]
            if len(rows):
                self._sums[rows] = 0.0
                gone = np.isin(np.array(self._above, np.int32), rows)
                self._above = array("i", np.array(self._above, np.int32)[~gone].tobytes())
                if gone.any() and len(self._above) < self._top:
                    self._resize(self._sums)  # others are among the largest now

    def top(self, k: int, now_ms: int, allowed: Bool | None = None) -> tuple[Int32, Float32]:
        """The k largest, best first, ties by row: rows [k] and their counts decayed to `now_ms`.

        Without `allowed` they are at hand up to `top`; with it (or beyond) every row that ever was counted is looked at.
        """
        with self._lock:
            if allowed is None and k <= self._top:
                rows = np.array(self._above, np.int32)
            else:
                every = np.flatnonzero(self._sums >= _NOTHING)
                rows = every[among(every, allowed)].astype(np.int32)
            sums = self._sums[rows]
            decay = self._decay.decay(now_ms)
        best = largest(sums, k)  # rows ascend: ties by row
        return rows[best], (sums[best] * decay).astype(np.float32)

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
            return {
                "clock": np.array(self._decay.state(), np.int64),
                "half_life_s": np.array([self._decay.half_life_ms / 1000]),
                "rows": rows,
                "sums": self._sums[rows],
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32 | None = None, **times: int) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone; `times`: see `ForwardDecay.restore`."""
        rows, kept = mapped(state["rows"], row_map)
        sums = np.zeros(max(1024, int(rows.max(initial=-1)) + 1))
        sums[rows] = counted(state["sums"], "trending")[kept]
        with self._lock:
            sums *= self._decay.restore(state["clock"].tolist(), half_life_of(state), **times)
            self._resize(np.where(sums < _NOTHING, 0.0, sums))


def largest(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.intp]:
    """Places of the k largest values [n], best first, the lower place first among equals; without sorting the rest."""
    if k >= len(values):
        return np.argsort(-values, kind="stable")
    if k < 1:
        return np.zeros(0, np.intp)
    rows = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return rows[np.argsort(-values[rows], kind="stable")[:k]]


def among(rows: Int32 | Int64, allowed: Bool | None) -> npt.NDArray[np.intp]:
    """Which places of `rows` hold an allowed one; below 0 or beyond the mask's end there is none."""
    kept = rows >= 0
    if allowed is not None:
        kept &= rows < len(allowed)
        kept[kept] = allowed[rows[kept]]
    return np.flatnonzero(kept)


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
