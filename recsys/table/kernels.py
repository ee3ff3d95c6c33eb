"""The loops of the CPU table's index, in Numba: no Python object, no GIL, one thread. Those of training: `optimizers.py`.

Compiled at first use, not at import: see `cpu.warm_up`. Numba's on-disk cache sees only changes of the file a kernel is
in: whoever changes `Index`, `Store` or a constant here touches `optimizers.py` too.

Legend: N keys of a call, D width of values, S width of state, U unique rows; a slot's place is its position among the
layout's slots. `at` [2, N]: row and position in the index of each key, -1 and -1 where there is none.

The index is one array of 64-byte lines of four entries, in order of hash: a key's home is the line `hash * lines >> 32`,
and it lies there or in a line after it, with no empty entry between. It grows from its end: hashes from SPLIT up have
NEXT_LINES for `lines`, the others LINES; SPLIT goes down, and when it is 0 a new round begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from recsys.table.intrinsics import fence, prefetch, stream_line
from recsys.types import Float32, Int32, Int64

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

LINES, NEXT_LINES, SPLIT, NEXT_ROW, FREE, LIVE, SEED = range(7)
"""Places in `meta`. NEXT_ROW: the lowest row never used; FREE: first of the list of freed rows, 0 if there is none."""
_BLOCK = 16
"""Keys between asking for a line and using it: 8 are slower, 32 no faster; a core has about 20 misses in flight."""
MOVED_LINES = 256
"""Lines that move in one step of growth: 16 KB, about 3 µs."""
_STREAM_BYTES = 2**22
"""Gathered output from this size on goes past the caches: it would push out the rows, and nobody reads it soon."""
MAX_STAMP = 2**24 - 1


class Index(NamedTuple):
    """What every kernel of the index needs; `recsys.table.index.KeyIndex` owns it.

    entries [P, 2]: key, and stamp << 40 | place << 32 | row, 0 where empty. changed [P]: when the entry's row was
    changed, as code 1 … 255. place_of: a slot's place, or -1. links [rows, ≥ 1]: freed rows say which follows.
    """

    entries: Int64
    changed: Array
    meta: Int64
    place_of: Int32
    links: Int32


class Store(NamedTuple):
    """Values [rows, D] and optimiser state [rows, S]; how a row begins: state `fresh` [S], values by `scale` [D]; how it
    learns, for each segment: `spans` (start, end, start of its state, optimiser) and `rates` (rate, epsilon).
    """

    values: Float32
    state: Float32
    fresh: Float32
    scale: Float32
    spans: Int64
    rates: Array


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    # `_nrt=False`: no counting of references. A kernel that takes a row of an array per key is twice as slow with it;
    # without it none can allocate, so callers give all room.
    try:
        return numba.njit(nogil=True, cache=True, _nrt=False)(function)
    except RuntimeError:  # no folder for the cache is writable: compile in each process
        return numba.njit(nogil=True, _nrt=False)(function)


@kernel
def _mix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _home(meta: Int64, place: int, key: int) -> int:
    x = _mix(np.uint64(key) + np.uint64(place) * np.uint64(0xD1342543DE82EF95) + np.uint64(meta[SEED]))
    hashed = np.int64(x >> np.uint64(32))
    lines = meta[NEXT_LINES] if hashed >= meta[SPLIT] else meta[LINES]
    return ((hashed * lines) >> 32) << 2


@kernel
def _probe(entries: Int64, i: int, place: int, key: int) -> int:
    """The position of the key, or of the empty entry that ends the search for it."""
    while entries[i, 1] != 0 and (entries[i, 0] != key or (entries[i, 1] >> 32) & 0xFF != place):
        i += 1
    return i


@kernel
def find(index: Index, slots: Int32, keys: Int64, at: Int32, stamp: int, values: Float32, out: Float32) -> int:
    """Fill `at`; stamp what is found, unless `stamp` is -1. `out` [N, D], if not empty, gets the values, those of the
    row of its place where a key is missing. Returns how many are missing, or -1 - n for an unknown slot n.

    Per block of keys: ask for its lines of the index; gather the block before; look up, and ask for its rows.
    """
    entries, meta, place_of = index.entries, index.meta, index.place_of
    count = slots.shape[0]
    for n in range(count):
        if slots[n] < 0 or slots[n] >= place_of.shape[0] or place_of[slots[n]] < 0:
            return -1 - n
    first_entry, first_value, width = entries.ctypes.data, values.ctypes.data, values.shape[1] * 4
    stream = out.size * 4 >= _STREAM_BYTES and width % 64 == 0 and out.ctypes.data % 64 == 0
    missing = 0
    for start in range(0, count + _BLOCK, _BLOCK):
        stop = min(start + _BLOCK, count)
        for n in range(start, stop):
            home = _home(meta, place_of[slots[n]], keys[n])
            at[1, n] = home
            prefetch(first_entry + home * 16)
        if out.shape[0] > 0 and start > 0:
            _gather(index, slots, at, values, out, start - _BLOCK, stream)
        for n in range(start, stop):
            place = np.int64(place_of[slots[n]])
            i = _probe(entries, np.int64(at[1, n]), place, keys[n])
            entry = entries[i, 1]
            if entry == 0:
                at[0, n] = -1
                at[1, n] = -1
                missing += 1
                continue
            row = entry & 0xFFFFFFFF
            at[0, n] = row
            at[1, n] = i
            if stamp > (entry >> 40) & MAX_STAMP:
                entries[i, 1] = (entry & 0xFFFFFFFFFF) | stamp << 40
            if out.shape[0] > 0:
                for line in range(0, width, 64):
                    prefetch(first_value + row * width + line)
    if stream:
        fence()
    return missing


@kernel
def _gather(index: Index, slots: Int32, at: Int32, values: Float32, out: Float32, start: int, stream: bool) -> None:
    """One block of `out`."""
    width = values.shape[1] * 4
    source, target = values.ctypes.data, out.ctypes.data
    for n in range(start, min(start + _BLOCK, at.shape[1])):
        row = np.int64(at[0, n])
        if row < 0:
            row = np.int64(index.place_of[slots[n]])
        if stream:
            for line in range(0, width, 64):
                stream_line(target + n * width + line, source + row * width + line)
        else:
            for d in range(values.shape[1]):
                out[n, d] = values[row, d]


@kernel
def insert(index: Index, store: Store, slots: Int32, keys: Int64, at: Int32, todo: Int32, marks: Any) -> int:
    """Fill `at` for the keys numbered in `todo`, with rows made where missing, from freed rows first; how many are new,
    or -1 where the index ends too soon. `marks`: least stamp, code of the change, whether to set initial values, head.

    The index must have room for them: `grow`.
    """
    entries, meta, links = index.entries, index.meta, index.links
    stamp, code, initial, head = marks
    new = 0
    for start in range(0, todo.shape[0], _BLOCK):
        stop = min(start + _BLOCK, todo.shape[0])
        for m in range(start, stop):
            n = todo[m]
            home = _home(meta, index.place_of[slots[n]], keys[n])
            at[1, n] = home
            prefetch(entries.ctypes.data + home * 16)
            prefetch(index.changed.ctypes.data + home)
        for m in range(start, stop):
            n = todo[m]
            place = np.int64(index.place_of[slots[n]])
            i = _probe(entries, np.int64(at[1, n]), place, keys[n])
            if i + 1 >= entries.shape[0]:
                return -1
            entry = entries[i, 1]
            if entry == 0:
                row = meta[FREE]
                if row > 0:
                    meta[FREE] = links[row, 0]
                else:
                    row = meta[NEXT_ROW]
                    meta[NEXT_ROW] = row + 1
                meta[LIVE] += 1
                new += 1
                entry = np.int64(place << 32 | row)
                entries[i, 0] = keys[n]
                for s in range(store.fresh.shape[0]):
                    store.state[row, s] = store.fresh[s]
                if initial:
                    _initialise(store, row, slots[n], keys[n], head)
            at[0, n] = entry & 0xFFFFFFFF
            at[1, n] = i
            entries[i, 1] = (entry & 0xFFFFFFFFFF) | max(stamp, (entry >> 40) & MAX_STAMP) << 40
            index.changed[i] = code
    return new


@kernel
def _initialise(store: Store, row: int, slot: int, key: int, head: int) -> None:
    """Values of a new row: what `rows.initial_values` says, one row at a time. `head`: the mixed seed."""
    mixed = _mix(_mix(np.uint64(slot) + np.uint64(head)) + np.uint64(key))
    values, scale = store.values[row], store.scale
    for d in range(values.shape[0]):
        bits = np.int32(_mix(mixed + np.uint64(d)) >> np.uint64(40))
        values[d] = (np.float32(bits) * np.float32(2**-23) - np.float32(1)) * scale[d]


@kernel
def fill(at: Int32, todo: Int32, values: Float32, out: Float32) -> None:
    """Values of the rows of the keys numbered in `todo`, into their places of `out`."""
    for m in range(todo.shape[0]):
        n = todo[m]
        for d in range(values.shape[1]):
            out[n, d] = values[at[0, n], d]


@kernel
def _take_out(index: Index, hole: int) -> None:
    """Free the row of an entry and close the gap: an entry moves back unless its home lies behind the hole."""
    entries, meta = index.entries, index.meta
    row = entries[hole, 1] & 0xFFFFFFFF
    index.links[row, 0] = meta[FREE]
    meta[FREE] = row
    meta[LIVE] -= 1
    i = hole + 1
    while entries[i, 1] != 0:
        if _home(meta, (entries[i, 1] >> 32) & 0xFF, entries[i, 0]) <= hole:
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
    for n in range(slots.shape[0]):
        place = np.int64(index.place_of[slots[n]])
        i = _probe(index.entries, _home(index.meta, place, keys[n]), place, keys[n])
        if index.entries[i, 1] != 0:
            _take_out(index, i)
            gone[removed] = n
            removed += 1
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
    return i, looked, removed


@kernel
def grow(index: Index, live: int, load: float, moving: Int64, when: Array) -> None:
    """Move the split down until `live` entries fill the lines in use to at most `load`. `moving` [_, 2], `when`: room."""
    entries, meta = index.entries, index.meta
    while True:
        lines, more = meta[LINES], meta[NEXT_LINES] - meta[LINES]
        if live <= 4 * load * (lines + more * (1.0 - meta[SPLIT] / 2.0**32)):
            return
        if meta[SPLIT] == 0:
            meta[LINES] = meta[NEXT_LINES]
            meta[NEXT_LINES] += max(meta[LINES] // 8, 32)
            meta[SPLIT] = 2**32
            continue
        end = (meta[SPLIT] * lines) >> 32
        line = max(end - MOVED_LINES, 0)
        start, stop = 4 * line, 4 * end
        while entries[stop, 1] != 0:
            stop += 1
        for n in range(stop - start):
            moving[n, 0], moving[n, 1], when[n] = entries[start + n, 0], entries[start + n, 1], index.changed[start + n]
            entries[start + n, 1] = 0
            index.changed[start + n] = 0
        meta[SPLIT] = -((-line << 32) // lines)
        for n in range(stop - start):
            if moving[n, 1] != 0:
                i = _home(meta, (moving[n, 1] >> 32) & 0xFF, moving[n, 0])
                while entries[i, 1] != 0:
                    i += 1
                entries[i, 0] = moving[n, 0]
                entries[i, 1] = moving[n, 1]
                index.changed[i] = when[n]


@kernel
def changes(index: Index, end: int, after: int, out: Int32) -> int:
    """Positions before `end` of entries changed with a code above `after`, of all if it is 0; how many."""
    entries, changed = index.entries, index.changed
    count = 0
    for start in range(0, end, 16):
        newest = np.uint8(0)
        for i in range(start, start + 16):
            newest = max(newest, changed[i])
        if newest <= after:
            continue
        for i in range(start, min(start + 16, end)):
            if changed[i] > after:
                out[count] = i
                count += 1
                prefetch(entries.ctypes.data + 16 * i)
    return count


@kernel
def relabel(changed: Array, codes: Array) -> None:
    """Replace every code by `codes[code]`."""
    for i in range(changed.shape[0]):
        changed[i] = codes[changed[i]]
