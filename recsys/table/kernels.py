"""The loops of the CPU table's index, in Numba: no Python object, no GIL, one thread. Those of training: `optimizers.py`.

Compiled at first use, not at import: see `warm.py`. Numba's on-disk cache sees only changes of the file a kernel is
in: whoever changes `Index`, `Store` or a constant here touches `optimizers.py` too.

Legend: N keys of a call, D width of values, S width of state, U unique rows; a slot's place is its position among the
layout's slots. `at` [2, N]: the row of each key (where it has none, the default row of its place), and its position in
the index (where it has none, ~position of the empty entry that ended the search).

The index is one array of 64-byte lines of four entries, in order of hash: a key's home is the line `hash * lines >> 32`,
and it lies there or in a line after it, with no empty entry between. It grows from its end: hashes from SPLIT up have
NEXT_LINES for `lines`, the others LINES; SPLIT goes down, and when it is 0 a new round begins.

Subscripts are unsigned (`_U`): Numba tests signed ones for being negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.table.intrinsics import (
    acquire,
    copy_line,
    decode,
    encode,
    fence,
    prefetch,
    release,
    search_line,
    stream_line,
)
from recsys.table.worth import HALF_LIFE
from recsys.types import Float32, Int32, Int64

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

LINES, NEXT_LINES, SPLIT, NEXT_ROW, FREE, LIVE, SEED, MOVES = range(8)
"""Places in `meta`. NEXT_ROW: the lowest row never used; FREE: first of the list of freed rows, 0 if there is none. MOVES: odd while
entries move or rows are freed, another number afterwards."""
BLOCK = 64
"""Keys between asking for a line and using it: a core has about 20 misses in flight, 24 lines of a block of keys fit
the first-level cache; 32 and 128 are as fast."""
_AHEAD = 16
"""Rows between asking for a row and copying it: 8 are slower, 32 no faster."""
STREAM_BYTES = 2**22
"""Gathered output from this size on goes past the caches: it would push out the rows, and nobody reads it soon."""
MAX_STAMP = 2**24 - 1
MAX_ROW = 2**28 - 1
MAX_USES = 15
_U = np.uint64
_NOT_STAMP = (1 << 40) - 1
_ROW, _USES = MAX_ROW, MAX_USES << 28
_HALF_LIFE = HALF_LIFE


class Index(NamedTuple):
    """What every kernel of the index needs; `recsys.table.index.KeyIndex` owns it.

    entries [P, 2]: key, and stamp << 40 | place << 32 | level of uses << 28 | row, 0 where empty. changed [P]: when the entry's row was
    changed, as code 1 … 255. place_of: a slot's place, or -1. links [rows, ≥ 1]: freed rows say which follows.
    """

    entries: Int64
    changed: Array
    meta: Int64
    place_of: Int32
    links: Int32


class Store(NamedTuple):
    """Values [rows, D] (float32, or halves as uint16 (float16) and int16 (bfloat16)) and optimiser state [rows, S]; how often a
    row was written by `put` [rows], odd while it is being written and before it ever was; how a row begins: state `fresh` [S],
    values by `scale` [places, D]; how it learns, for each segment: `spans` (start, end, start of its state, optimiser) and
    `rates` (rate, epsilon, three of the optimiser's own).
    """

    values: Array
    state: Float32
    writes: Array
    fresh: Float32
    scale: Float32
    spans: Int64
    rates: Array


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    # `_nrt=False`: no counting of references. A kernel that takes a row of an array per key is twice as slow with it;
    # without it none can allocate, so callers give all room.
    return compiled(function, _nrt=False)


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a kernel. Always compiled into its caller: a call passes each array as seven numbers, 20 ns a key."""
    return compiled(function, _nrt=False, forceinline=True)


@part
def _mix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@part
def _home(meta: Int64, place: int, key: int) -> Any:
    """The line where the search for a key begins."""
    hashed = _mix(_U(key) + _U(place) * _U(0xD1342543DE82EF95) + _U(meta[SEED])) >> _U(32)
    return (hashed * _U(meta[NEXT_LINES] if hashed >= _U(meta[SPLIT]) else meta[LINES])) >> _U(32)


@kernel
def unknown(place_of: Int32, slots: Int32) -> int:
    """How many slots have no place."""
    count, size = 0, _U(place_of.shape[0])
    for n in range(slots.shape[0]):
        s = _U(np.uint32(slots[n]))
        known = s < size
        count += place_of[s if known else _U(0)] < 0 or not known
    return count


@part
def _homes(index: Index, slots: Int32, keys: Int64, at: Int32, span: Any) -> None:
    """`at` of a block: place and home line. The compiler makes vectors of this loop, so nothing else is in it."""
    meta, place_of = index.meta, index.place_of
    lines, more, split, seed = _U(meta[LINES]), _U(meta[NEXT_LINES]), _U(meta[SPLIT]), _U(meta[SEED])
    for n in range(span[0], span[1]):
        place = place_of[_U(slots[n])]
        hashed = _mix(_U(keys[n]) + _U(place) * _U(0xD1342543DE82EF95) + seed) >> _U(32)
        at[0, _U(n)] = place
        at[1, _U(n)] = (hashed * (more if hashed >= split else lines)) >> _U(32)


@part
def _seen(word: int, key: int, stamp: int, tick: int) -> Any:
    """The word of a row that is seen again; with a tick it is also counted: `worth.counted`."""
    old = (word >> 40) & MAX_STAMP
    level = (word >> 28) & MAX_USES
    if tick != 0:
        if stamp > old:
            level = max(level - (stamp - old) // _HALF_LIFE, 0)
            drawn = np.int64(_mix(_U(key) + _U(tick)) & _U((1 << level) - 1))
            level += 1 if drawn == 0 and level < MAX_USES else 0
        elif level == 0:
            level = 1
    return (word & _NOT_STAMP & ~_USES) | level << 28 | max(stamp, old) << 40


@part
def _search(index: Index, keys: Int64, at: Int32, span: Any, marks: Any) -> int:
    """Turn places and home lines of a block into rows and positions; how many are missing.

    A home line is searched without a branch: those who must look further wait in at[2] while their next two lines come. With
    each search goes a prefetch for the next block, whose home lines are in `at`: memory is never idle.
    """
    entries, changed = index.entries, index.changed
    base = entries.ctypes.data
    start, stop = span
    stamp, code, tick = marks
    missing = more = 0
    for n in range(start, stop):
        line, place = np.int64(at[1, _U(n)]), np.int64(at[0, _U(n)])
        if n + BLOCK < at.shape[1]:
            prefetch(base + (np.int64(at[1, _U(n + BLOCK)]) << 6))
        found = search_line(base + (line << 6), place, keys[_U(n)])
        far = found >> 3
        at[2, _U(start + more)] = n
        more += far
        prefetch(base + ((line + far) << 6))
        prefetch(base + ((line + 2 * far) << 6))
        i = (line << 2) + (found & 3)
        word = entries[_U(i), _U(1)]
        at[1, _U(n)] = line if far else (i if found < 4 else ~i)
        at[0, _U(n)] = word & _ROW if found < 4 else place
        missing += (found >> 2) & 1
        # A line that stays as it is need not be written back.
        if found < 4 and (stamp > (word >> 40) & MAX_STAMP or (tick != 0 and word & _USES == 0)):
            entries[_U(i), _U(1)] = _seen(word, keys[_U(n)], stamp, tick)
        if code > 0:
            prefetch(changed.ctypes.data + i)
    for r in range(start, start + more):
        late = _U(at[2, _U(r)])
        line, place = np.int64(at[1, late]), np.int64(at[0, late])
        found = 8
        while found == 8:
            line += 1
            found = search_line(base + (line << 6), place, keys[late])
        i = (line << 2) + (found & 3)
        at[1, late] = i if found < 4 else ~i
        if found < 4:
            word = entries[_U(i), _U(1)]
            at[0, late] = word & _ROW
            if stamp > (word >> 40) & MAX_STAMP or (tick != 0 and word & _USES == 0):
                entries[_U(i), _U(1)] = _seen(word, keys[late], stamp, tick)
        else:
            missing += 1
    if code > 0:
        for n in range(start, stop):
            i = np.int64(at[1, _U(n)])
            if i >= 0 and code > changed[_U(i)]:
                changed[_U(i)] = code
    return missing


@kernel
def find(index: Index, slots: Int32, keys: Int64, at: Int32, marks: Any) -> int:
    """Fill `at` [3, N]; how many keys are missing. `marks`, for what is found: least stamp, code of a change, and the tick to
    count its use with; 0: none."""
    count, missing, base = slots.shape[0], 0, index.entries.ctypes.data
    _homes(index, slots, keys, at, (0, min(BLOCK, count)))
    for n in range(min(BLOCK, count)):
        prefetch(base + (np.int64(at[1, _U(n)]) << 6))
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        _homes(index, slots, keys, at, (stop, min(stop + BLOCK, count)))
        missing += _search(index, keys, at, (start, stop), marks)
    return missing


@kernel
def gather(values: Array, at: Int32, out: Float32, stream: bool) -> None:
    """Copy the row of each key to `out` [N, D]; `stream`: past the caches, for what is so large that it pushes out rows."""
    count, width = out.shape[0], values.strides[0]
    source, target = values.ctypes.data, out.ctypes.data
    lines = values.itemsize == 4 and width % 64 == 0
    stream = stream and target % 64 == 0
    for n in range(count):
        ahead = source + np.int64(at[0, _U(min(n + _AHEAD, count - 1))]) * width
        for line in range(0, width, 64):
            prefetch(ahead + line)
        row = np.int64(at[0, _U(n)])
        if lines and stream:
            for line in range(0, width, 64):
                stream_line(target + n * width + line, source + row * width + line)
        elif lines:
            for line in range(0, width, 64):
                copy_line(target + n * width + line, source + row * width + line)
        else:
            stored, copy = values[row], out[n]
            for d in range(copy.shape[0]):
                copy[d] = decode(stored[d])
    if stream:
        fence()


@kernel
def read(index: Index, values: Array, batch: Any, out: Float32, found: Array, stream: bool) -> None:
    """`find`, `gather` and which keys were there [N], in one call. `batch`: slots, keys, room for `at`."""
    slots, keys, at = batch
    find(index, slots, keys, at, (0, 0, 0))
    gather(values, at, out, stream)
    for n in range(at.shape[1]):
        found[n] = at[1, n] >= 0


@kernel
def insert(index: Index, store: Store, slots: Int32, keys: Int64, at: Int32, todo: Int32, marks: Any) -> int:
    """Fill `at` for the keys numbered in `todo`, with rows made where missing, from freed rows first; how many are new.
    `at` is as `find` left it, and the index has had room since before: `grow`. `marks`: least stamp, code of the change,
    whether to set initial values, head of their hash.
    """
    entries, meta, links, changed = index.entries, index.meta, index.links, index.changed
    stamp, code, initial, head = marks
    new = 0
    for m in range(todo.shape[0]):
        if m + _AHEAD < todo.shape[0]:
            i = np.int64(at[1, _U(todo[m + _AHEAD])])
            i = i if i >= 0 else ~i
            prefetch(entries.ctypes.data + i * 16)
            prefetch(changed.ctypes.data + i)
        n = _U(todo[m])
        i, key, place = np.int64(at[1, n]), keys[n], np.int64(index.place_of[_U(slots[n])])
        if i < 0:
            i = ~i  # others of this call may have come into this entry or behind it
            while entries[_U(i), _U(1)] != 0 and (
                entries[_U(i), _U(0)] != key or (entries[_U(i), _U(1)] >> 32) & 0xFF != place
            ):
                i += 1
        entry = entries[_U(i), _U(1)]
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
            if _U(row) < _U(store.writes.shape[0]):  # an index without rows has none
                store.writes[_U(row)] |= 1
            entries[_U(i), _U(0)] = key
            for s in range(store.fresh.shape[0]):
                store.state[_U(row), _U(s)] = store.fresh[s]
            if initial:
                _initialise(store, row, place, _mix(_mix(_U(slots[n]) + _U(head)) + _U(key)))
        at[0, n] = entry & _ROW
        at[1, n] = i
        release()  # the word comes last: until then the entry is an empty one
        entries[_U(i), _U(1)] = (entry & _NOT_STAMP) | max(stamp, (entry >> 40) & MAX_STAMP) << 40
        changed[_U(i)] = code
    return new


@part
def _initialise(store: Store, row: int, place: int, mixed: Any) -> None:
    """Values of a new row: what `rows.initial_values` says, one row at a time."""
    values, scale = store.values[row], store.scale[place]
    half = (values.shape[0] + 1) // 2  # of 64 bits of hash, each value takes 24
    for d in range(half):
        hashed = _mix(mixed + _U(d))
        first, second = np.int32(hashed >> _U(40)), np.int32((hashed >> _U(8)) & _U(0xFFFFFF))
        values[d] = encode((np.float32(first) * np.float32(2**-23) - np.float32(1)) * scale[d], values[d])
        if half + d < values.shape[0]:
            value = (np.float32(second) * np.float32(2**-23) - np.float32(1)) * scale[half + d]
            values[half + d] = encode(value, values[half + d])


@kernel
def put(at: Int32, store: Store, given: Float32) -> None:
    """Set the rows of `at` to `given` [N, D], in order: the last of duplicates stays."""
    for n in range(given.shape[0]):
        r = _U(at[0, n])
        row, new = store.values[r], given[n]
        store.writes[r] |= 1
        release()
        for d in range(row.shape[0]):
            row[d] = encode(new[d], row[d])
        release()
        store.writes[r] += 1


@kernel
def read_shared(index: Index, values: Array, writes: Array, batch: Any, out: Float32, found: Array) -> int:
    """As `read`, from another process's tables while it writes: `found` [N] is 2 for a row that was being written, so that `out` has
    no use. Returns how many those are, or -1 where entries moved meanwhile and nothing has."""
    slots, keys, at = batch
    moves = index.meta[MOVES]
    acquire()
    find(index, slots, keys, at, (0, 0, 0))
    for n in range(at.shape[1]):
        at[2, _U(n)] = writes[_U(at[0, _U(n)])]
    acquire()
    gather(values, at, out, False)
    acquire()
    torn = 0
    for n in range(at.shape[1]):
        before = at[2, _U(n)]
        whole = before & 1 == 0 and writes[_U(at[0, _U(n)])] == before
        found[n] = (1 if at[1, _U(n)] >= 0 else 0) if whole else 2
        torn += 0 if whole else 1
    return -1 if moves & 1 or index.meta[MOVES] != moves else torn
