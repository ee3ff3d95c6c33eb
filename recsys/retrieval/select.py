"""Choosing among catalogue rows: which may be shown, what several lists say of each together, the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.compiled import compiled
from recsys.types import Bool, Int32, Int64

Float64 = npt.NDArray[np.float64]
_EVERY = np.zeros(0, np.bool_)
NO_ROWS: Int32 = np.zeros(0, np.int32)


@compiled
def may_show(row: Any, allowed: Any, left_out: Any) -> bool:
    """Whether a row is allowed and not left out, which ascends; below 0 or beyond the mask's end there is none."""
    if row < 0 or row >= len(allowed) or not allowed[row]:
        return False
    if len(left_out) == 0:
        return True
    at = np.searchsorted(left_out, row)
    return bool(at == len(left_out) or left_out[at] != row)


@compiled
def _places(rows: Any, allowed: Any, filtered: Any, left_out: Any, out: Any) -> int:
    count = 0
    for place in range(len(rows)):
        row = rows[place]
        if not filtered:
            shown = row >= 0
            if shown and len(left_out) > 0:
                at = np.searchsorted(left_out, row)
                shown = at == len(left_out) or left_out[at] != row
        else:
            shown = may_show(row, allowed, left_out)
        if shown:
            out[count] = place
            count += 1
    return count


def among(rows: Int32 | Int64, allowed: Bool | None, left_out: Int32 | None = None) -> npt.NDArray[np.intp]:
    """Which places of `rows` hold an allowed one that is not left out; below 0 or beyond the mask's end there is none."""
    out = np.empty(len(rows), np.intp)
    missing = NO_ROWS if left_out is None else np.sort(left_out)
    count = _places(rows, _EVERY if allowed is None else allowed, allowed is not None, missing, out)
    return out[:count]


@compiled
def place_of(row: Any, places: Any, rows: Any) -> Any:
    """Where the hash table `places` (numbers in `rows`, from 1; a power of two of them) has a row, or has room for it."""
    at = np.int64((np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (len(places) - 1)
    while places[at] and rows[places[at] - 1] != row:
        at = (at + 1) & (len(places) - 1)
    return at


@compiled
def room_for(count: Any) -> Any:
    """A hash table for so many rows, empty."""
    size = 64
    while size < 2 * count:
        size *= 2
    return np.zeros(size, np.int32)


@compiled
def _tally(rows: Any, values: Any, out_rows: Any, out: Any) -> int:
    places, count = room_for(len(rows)), 0
    for entry in range(len(rows)):
        at = place_of(rows[entry], places, out_rows)
        if places[at] == 0:
            out_rows[count], out[count] = rows[entry], 0.0
            count += 1
            places[at] = count
        out[places[at] - 1] += values[entry]
    return count


def tally(rows: Int32, values: Float64) -> tuple[Int32, Float64]:
    """Each distinct row, in order of its first entry, and the sum of its values, added in their order."""
    out_rows, out = np.empty(len(rows), np.int32), np.empty(len(rows))
    count = _tally(rows, values, out_rows, out)
    return out_rows[:count], out[:count]


@compiled
def _looked_up(rows: Any, values: Any, wanted: Any, out: Any) -> None:
    places = room_for(len(rows))
    for entry in range(len(rows)):
        places[place_of(rows[entry], places, rows)] = entry + 1
    for entry in range(len(wanted)):
        found = places[place_of(wanted[entry], places, rows)]
        out[entry] = values[found - 1] if found else 0.0


def looked_up(rows: Int32, values: Float64, wanted: Int32) -> Float64:
    """The value of each wanted row [n] among distinct rows; 0 where it is not among them."""
    out = np.empty(len(wanted))
    _looked_up(rows, values, wanted, out)
    return out


@compiled
def _worse(rows: Any, values: Any, one: Any, other: Any) -> bool:
    return bool(values[one] < values[other] or (values[one] == values[other] and rows[one] > rows[other]))


@compiled
def _swap(rows: Any, values: Any, one: Any, other: Any) -> None:
    rows[one], rows[other] = rows[other], rows[one]
    values[one], values[other] = values[other], values[one]


@compiled
def _sift(rows: Any, values: Any, at: Any, size: Any) -> None:
    """Let the entry at `at` sink in the first `size`, a heap with the worst on top."""
    while 2 * at + 1 < size:
        least = 2 * at + 1
        if least + 1 < size and _worse(rows, values, least + 1, least):
            least += 1
        if not _worse(rows, values, least, at):
            return
        _swap(rows, values, least, at)
        at = least


@compiled
def best_first(rows: Any, values: Any, k: Any) -> int:
    """Put the k largest values first, best first, ties by row, each with its row; how many these are. The rest is in no order."""
    k = max(0, min(k, len(rows)))
    for at in range(k // 2 - 1, -1, -1):
        _sift(rows, values, at, k)
    for entry in range(k, len(rows) if k else 0):
        if _worse(rows, values, 0, entry):
            _swap(rows, values, 0, entry)
            _sift(rows, values, 0, k)
    for size in range(k - 1, 0, -1):
        _swap(rows, values, 0, size)
        _sift(rows, values, 0, size)
    return int(k)


def best(rows: Int32 | Int64, values: npt.NDArray[Any], k: int) -> npt.NDArray[np.intp]:
    """Places of the k largest values, best first, ties by row; without sorting the rest."""
    if k < 1:
        return np.zeros(0, np.intp)
    if k < len(values):
        least = np.partition(values, len(values) - k)[len(values) - k]
        found = np.flatnonzero(values >= least)
        return found[np.lexsort((rows[found], -values[found]))[:k]]
    return np.lexsort((rows, -values))


def largest(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.intp]:
    """Places of the k largest values [n], best first, the lower place first among equals; without sorting the rest."""
    if k >= len(values):
        return np.argsort(-values, kind="stable")
    if k < 1:
        return np.zeros(0, np.intp)
    rows = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return rows[np.argsort(-values[rows], kind="stable")[:k]]


def warm_up() -> None:
    """Compile, for the types that are used: not in the first request."""
    rows, values = np.zeros(1, np.int32), np.zeros(1)
    for some in (rows, rows.astype(np.int64)):
        among(some, np.ones(1, np.bool_), rows)
    looked_up(*tally(rows, values), rows)
