"""The loops of followed attributes, in Numba: a value's items in order, and what several values say of each item together.

A value's list has its popular items in order, and after them its newest ones; every fourth place belongs to one of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.compiled import compiled
from recsys.retrieval.select import best_first, place_of, room_for

NEWEST_EVERY = 4
"""Every fourth place of a value belongs to its newest items, so that new ones get a chance beside popular ones."""
_WORTH = 1.0 / np.sqrt(1.0 + np.arange(1024))
"""Of a place; there are at most 400 popular items and 50 newest ones."""
_LEFT_OUT = 2


@compiled
def popular_first(rows: Any, popularity: Any) -> None:
    """Put rows in order of their popularity, ties by row."""
    values = np.empty(len(rows))
    for entry in range(len(rows)):
        values[entry] = popularity[rows[entry]]
    best_first(rows, values, len(rows))


@compiled
def ranked(popular: Any, popularity: Any, newest: Any) -> Any:
    """A value's list. Popular items that are in order but for a few take little time (an insertion sort)."""
    count = len(popular)
    out, values, places = np.empty(count + len(newest), np.int32), np.empty(count), room_for(count)
    for entry in range(count):
        row, at = popular[entry], entry
        value = popularity[row]
        while at > 0 and (values[at - 1] < value or (values[at - 1] == value and out[at - 1] > row)):
            out[at], values[at] = out[at - 1], values[at - 1]
            at -= 1
        out[at], values[at] = row, value
    for entry in range(count):
        places[place_of(out[entry], places, out)] = entry + 1
    for row in newest:
        if places[place_of(row, places, out)] == 0:
            out[count] = row
            count += 1
    return out[:count]


@compiled
def blended(lists: Any, weights: Any, room: Any, allowed: Any, filtered: Any, left_out: Any) -> Any:
    """Of some values' lists: the rows that may be shown, in order of their first entries, Σ weight × worth of each, and how many rows
    there are. `lists`: one after the other, and sizes of each and of the popular items in it [V, 2]. `room`:
    a flag and a sum for every row that there may be, zeros, which they are again afterwards."""
    rows, sizes = lists
    seen, sums = room
    out, known, start = np.empty(len(rows) + 1, np.int32), 0, 0
    for value in range(len(sizes)):
        populars = sizes[value, 1]
        for entry in range(sizes[value, 0]):
            place = entry + entry // (NEWEST_EVERY - 1) if entry < populars else (entry - populars) * NEWEST_EVERY + 3
            row = rows[start + entry]
            sums[row] += weights[value] * _WORTH[place]
            out[known] = row  # without a branch, which would be guessed wrong every other time
            known += 1 - seen[row]
            seen[row] = 1
        start += sizes[value, 0]
    for row in left_out:
        if 0 <= row < len(seen):
            seen[row] = _LEFT_OUT  # a search of each row in them takes longer than all the rest
    totals, kept = np.empty(known), 0
    for entry in range(known):
        row = out[entry]
        if seen[row] != _LEFT_OUT and (not filtered or (row < len(allowed) and allowed[row])):
            out[kept], totals[kept] = row, sums[row]
            kept += 1
        seen[row], sums[row] = 0, 0.0
    for row in left_out:
        if 0 <= row < len(seen):
            seen[row] = 0
    return out[:kept], totals[:kept], known
