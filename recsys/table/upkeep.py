"""The loops that keep the CPU table's index in shape, in Numba as `kernels.py`: removal, sweep, growth, what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.table.intrinsics import above64, lowest_bit, prefetch, release, search_line
from recsys.table.kernels import (
    FREE,
    LINES,
    LIVE,
    MAX_ROW,
    MAX_STAMP,
    MOVES,
    NEXT_LINES,
    SEED,
    SPLIT,
    Index,
    _home,
    _mix,
    kernel,
    part,
)
from recsys.types import Int32, Int64

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

MOVED_LINES = 256
"""Lines that move in one step of growth: 16 KB, about 6 µs."""
ROUND = 8
"""A round of growth adds an eighth: each entry moves eight times over a growth, and the index is 6% larger than it need be
on average. A quarter: four times, 12%, but the load must be 0.72 then, see `index.LOAD`."""
_NO_PLACE = 256
"""One that no entry has, to look for an empty one."""
_U = np.uint64


@part
def _begin(index: Index) -> None:
    """Whoever reads beside finds out that entries move, or did: before the first one does."""
    index.meta[MOVES] += 1
    release()


@part
def _end(index: Index) -> None:
    release()
    index.meta[MOVES] += 1


@part
def _take_out(index: Index, hole: int) -> None:
    """Free the row of an entry and close the gap: an entry moves back unless its home lies behind the hole."""
    entries, meta = index.entries, index.meta
    row = entries[hole, 1] & MAX_ROW
    index.links[row, 0] = meta[FREE]
    meta[FREE] = row
    meta[LIVE] -= 1
    i = hole + 1
    while entries[i, 1] != 0:
        if np.int64(_home(meta, (entries[i, 1] >> 32) & 0xFF, entries[i, 0])) << 2 <= hole:
            entries[hole, 0] = entries[i, 0]
            entries[hole, 1] = entries[i, 1]
            index.changed[hole] = index.changed[i]
            hole = i
        i += 1
    entries[hole, 1] = 0
    index.changed[hole] = 0


@kernel
def remove(index: Index, slots: Int32, keys: Int64, gone: Int32) -> int:
    """Take the keys out of the index and free their rows; `gone` says which were there, the result how many."""
    removed = 0
    _begin(index)
    for n in range(slots.shape[0]):
        place = np.int64(index.place_of[slots[n]])
        i = np.int64(_home(index.meta, place, keys[n])) << 2
        while index.entries[i, 1] != 0:
            if index.entries[i, 0] == keys[n] and (index.entries[i, 1] >> 32) & 0xFF == place:
                _take_out(index, i)
                gone[removed] = n
                removed += 1
                break
            i += 1
    _end(index)
    return removed


@kernel
def sweep(index: Index, start: int, stop: int, looks: int, oldest: Int64, gone: Int64) -> tuple[int, int, int]:
    """Remove entries of [start, stop) stamped before `oldest` of their place, looking at up to `looks` of them, and put
    their key and place into `gone` [looks, 2]. Returns the position to go on from, how many it looked at and removed.

    What moves into a gap comes from behind it, so nothing escapes.
    """
    entries = index.entries
    looked = removed = 0
    i = start
    _begin(index)
    while i < stop and looked < looks:
        entry = entries[i, 1]
        if entry == 0:
            i += 1
            continue
        looked += 1
        place = (entry >> 32) & 0xFF
        if (entry >> 40) & MAX_STAMP < oldest[place]:
            gone[removed, 0] = entries[i, 0]
            gone[removed, 1] = place
            removed += 1
            _take_out(index, i)
        else:
            i += 1
    _end(index)
    return i, looked, removed


@kernel
def survey(index: Index, first: int, last: int, positions: Int32, hashed: Array) -> int:
    """Positions and hashes of the entries whose hash, its highest 32 bits, is in [first, last); how many. Room for all of them."""
    entries, meta = index.entries, index.meta
    split, count = meta[SPLIT], 0
    for half in range(2):  # below the split and from it on: in both, lines go up with the hash
        low, high = (max(first, split), last) if half else (first, min(last, split))
        lines = meta[NEXT_LINES] if half else meta[LINES]
        i, end = ((low * lines) >> 32) << 2, ((((high - 1) * lines) >> 32) + 1) << 2
        while low < high and (i < end or entries[_U(i), _U(1)] != 0):
            key, word = entries[_U(i), _U(0)], entries[_U(i), _U(1)]
            mixed = _mix(_U(key) + _U((word >> 32) & 0xFF) * _U(0xD1342543DE82EF95) + _U(meta[SEED]))
            top = np.int64(mixed >> _U(32))
            if word != 0 and low <= top and top < high and count < positions.shape[0]:
                positions[count] = i
                hashed[count] = mixed
                count += 1
            i += 1
    return count


@kernel
def small(index: Index, live: int, load: float) -> bool:
    """Whether `live` entries would fill the lines in use to more than `load`."""
    lines, more = index.meta[LINES], index.meta[NEXT_LINES] - index.meta[LINES]
    return live > 4 * load * (lines + more * (1.0 - index.meta[SPLIT] / 2.0**32))


@kernel
def grow(index: Index, live: int, load: float, moving: Int64, when: Array, fills: Array) -> None:
    """Move the split down until `live` entries fill the lines in use to at most `load`. `moving` [_, 2], `when`: room.

    A step moves the lines before the split to where their entries belong after it. That is far behind them, but for the
    first lines of the index; so they go straight there, and only what has to come back (it had spilled over from lines
    that do not move) waits in `moving` until the lines are empty. `fills` says how many entries each new line has: reading
    it from the line itself would wait for the last entry's way to the cache.
    """
    entries, meta, changed = index.entries, index.meta, index.changed
    _begin(index)
    while small(index, live, load):
        lines = meta[LINES]
        if meta[SPLIT] == 0:
            meta[LINES] = meta[NEXT_LINES]
            meta[NEXT_LINES] += max(meta[LINES] // ROUND, 32)
            meta[SPLIT] = 2**32
            continue
        end = (meta[SPLIT] * lines) >> 32
        line = max(end - MOVED_LINES, 0)
        start, stop = 4 * line, 4 * end
        while entries[_U(stop), _U(1)] != 0:
            stop += 1
        before, split = meta[SPLIT], -((-line << 32) // lines)
        meta[SPLIT] = split
        more, seed = _U(meta[NEXT_LINES]), _U(meta[SEED])
        first = (_U(split) * more) >> _U(32)
        # From the line that the step before began with on, lines are in use.
        empty = ((_U(before) * more) >> _U(32)) - first
        straight = first << _U(2) > _U(stop) and empty <= _U(fills.shape[0])
        for n in range(fills.shape[0]):
            fills[n] = 0
        waiting = 0
        for n in range(start, stop):
            key, word = entries[_U(n), _U(0)], entries[_U(n), _U(1)]
            hashed = _mix(_U(key) + _U((word >> 32) & 0xFF) * _U(0xD1342543DE82EF95) + seed) >> _U(32)
            if straight and hashed >= _U(split):
                if word == 0:
                    continue
                line_in = ((hashed * more) >> _U(32)) - first
                while line_in < empty and fills[line_in] == 4:
                    line_in += _U(1)
                if line_in >= empty:
                    _enter(index, first + line_in, key, word, changed[_U(n)])
                    continue
                i = ((first + line_in) << _U(2)) + _U(fills[line_in])
                fills[line_in] += 1
                entries[i, _U(0)] = key
                entries[i, _U(1)] = word
                changed[i] = changed[_U(n)]
                continue
            moving[_U(waiting), _U(0)], moving[_U(waiting), _U(1)], when[_U(waiting)] = key, word, changed[_U(n)]
            waiting += word != 0
        for n in range(start, stop):
            entries[n, 1] = 0
            changed[n] = 0
        for n in range(waiting):
            key, word = moving[n, 0], moving[n, 1]
            _enter(index, _home(meta, (word >> 32) & 0xFF, key), key, word, when[n])
    _end(index)


@part
def _enter(index: Index, line: Any, key: int, word: int, code: int) -> None:
    """Put an entry that is not there into the first empty place from a line on."""
    base = index.entries.ctypes.data
    found = search_line(base + np.int64(line << _U(6)), _NO_PLACE, key)
    while found == 8:
        line += _U(1)
        found = search_line(base + np.int64(line << _U(6)), _NO_PLACE, key)
    i = (line << _U(2)) + _U(found & 3)
    index.entries[i, _U(0)] = key
    index.entries[i, _U(1)] = word
    index.changed[i] = code


@kernel
def changes(index: Index, end: int, after: int, out: Int32) -> int:
    """Positions before `end`, a multiple of 64, of entries changed with a code above `after`, of all if it is 0; how many."""
    entries, changed = index.entries.ctypes.data, index.changed.ctypes.data
    count = 0
    for start in range(0, end, 64):
        newer = above64(changed + start, after)
        while newer != 0:
            i = start + lowest_bit(newer)
            newer &= newer - _U(1)
            out[_U(count)] = i
            count += 1
            prefetch(entries + 16 * i)
    return count


@kernel
def identify(index: Index, positions: Int32, places: Int32, keys: Int64) -> None:
    """Place and key of the entries at positions."""
    entries = index.entries
    for n in range(positions.shape[0]):
        i = _U(positions[n])
        keys[n] = entries[i, _U(0)]
        places[n] = (entries[i, _U(1)] >> 32) & 0xFF


@kernel
def relabel(changed: Array, codes: Array) -> None:
    """Replace every code by `codes[code]`."""
    for i in range(changed.shape[0]):
        changed[i] = codes[changed[i]]
