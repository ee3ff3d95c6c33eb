"""Finding and entering keys of the CUDA table's index, in Triton; and the filter that counts keys without a row.

With TRITON_INTERPRET=1, set before Triton is first imported, the same kernels run on CPU tensors: that is how machines
without a device test them.

Legend: N keys of a call (`n`; one lane each). The index is (`entries`, `mask`, `fallback`): lines of four entries, each a key
and slot << 32 | row (or EMPTY, DELETED, or CLAIMED - lane while a call makes rows); the number of lines is a power of two,
`mask` one less; `fallback` [65536] is each slot's default row, -1 for a slot there is not. A row below 0 means: skip this
lane. SHAPE is known when a kernel is compiled: lanes of a program, if nothing else is said.

Inside `while`, `tl.reduce` stands in for `tl.max`: the interpreter would set itself up anew at every call of the latter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton resolves every name of a kernel's signature when it compiles, so tensors cannot be annotated.

from __future__ import annotations

import triton
import triton.language as tl

EMPTY, DELETED, CLAIMED = -1, -2, -3
LINE = 4
"""Entries of a line: 64 bytes, read at once. Half would be one access of the device's memory instead of two, but ends in a
second, dependent one for many more keys."""

_EMPTY, _DELETED, _CLAIMED = tl.constexpr(EMPTY), tl.constexpr(DELETED), tl.constexpr(CLAIMED)
_NEVER = tl.constexpr(-(2**62))
"""A word that no entry ever holds: a compare-and-swap takes no mask, so lanes that must not write expect this."""


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as `recsys.keys.mix`."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _home(slot, key, mask):
    return _mix(key.to(tl.uint64) + slot.to(tl.uint64) * 0xD1342543DE82EF95).to(tl.int64) & mask


@triton.jit
def _any(flags):
    return tl.reduce(flags.to(tl.int32), 0, tl.standard._elementwise_max) > 0


@triton.jit
def _most(values):
    """The largest of each line."""
    return tl.reduce(values, 1, tl.standard._elementwise_max)


@triton.jit
def _line(entries, i, active, CACHE: tl.constexpr):
    """Keys and words [lanes, 4] of line `i` of each lane."""
    at = entries + i[:, None] * 8 + tl.arange(0, 8)[None, :]
    pairs = tl.load(at, mask=active[:, None], other=_EMPTY, cache_modifier=CACHE)
    return tl.split(tl.reshape(pairs, (i.shape[0], 4, 2)))


@triton.jit
def _probe(index, slot, key, active):
    """Row of each active (slot, key), -1 where there is none, and the position of its entry."""
    entries, mask = index[0], index[1]
    column = tl.arange(0, 4)[None, :]
    i = _home(slot, key, mask)
    best = i * 0 - 1
    while _any(active):
        keys, words = _line(entries, i, active, "")
        hit = (keys == key[:, None]) & (words >> 32 == slot[:, None])  # a negative word has slot -1, which no key has
        best = tl.where(active, _most(tl.where(hit, (words & 0xFFFFFFFF) << 2 | column, -1)), best)
        ended = _most(tl.where(words == _EMPTY, 1, 0))
        active = active & (best < 0) & (ended == 0)
        i = tl.where(active, (i + 1) & mask, i)
    return best >> 2, i * 4 + (best & 3)


@triton.jit
def _find(index, batch, at, n):
    """Slot, key and row of each lane: the slot's default row where the key is missing, -1 for a slot that has none."""
    slots, keys = batch
    slot = tl.load(slots + at, mask=at < n, other=-1).to(tl.int64)
    key = tl.load(keys + at, mask=at < n, other=0)
    otherwise = tl.load(index[2] + slot, mask=(slot >= 0) & (slot < 65536), other=-1).to(tl.int64)
    row = _probe(index, slot, key, at < n)[0]
    return tl.where(row >= 0, row, otherwise)


@triton.jit(do_not_specialize=["n"])
def find(index, batch, rows, n, SHAPE: tl.constexpr):
    """Rows [N] of the keys."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    tl.store(rows + at, _find(index, batch, at, n).to(tl.int32), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def enter(index, batch, claims, n, SHAPE: tl.constexpr):
    """`find`, and claim an entry and a row for each missing key: `settle` completes them. SHAPE: default rows, lanes.

    `claims`: rows [N], -2 - row for the lane that claimed it; places [N], the entry of a missing key; next unused row, freed
    rows, …, rows claimed in this call; the freed rows. Every lane of a key takes the first free entry on its way, and none
    becomes free meanwhile: so they meet in one, whose word names the lane that won the race for it.
    """
    entries, mask = index[0], index[1]
    rows, places, counts, freed = claims
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * SHAPE[1] + tl.arange(0, SHAPE[1])
    row = _find(index, batch, at, n)
    active = (row >= 0) & (row < SHAPE[0])
    if _any(active):
        slot = tl.load(slots + at, mask=active, other=0).to(tl.int64)
        key = tl.load(keys + at, mask=active, other=0)
        column = tl.arange(0, 4)[None, :]
        i = _home(slot, key, mask)
        winner = active & (at < 0)
        while _any(active):
            words = _line(entries, i, active, ".cg")[1]  # from the cache that all multiprocessors share
            taken = (words <= _CLAIMED) & active[:, None]
            lane = -words + _CLAIMED
            same = taken & (tl.load(keys + lane, mask=taken, other=0) == key[:, None])
            same = same & (tl.load(slots + lane, mask=taken, other=0).to(tl.int64) == slot[:, None])
            free = (words == _EMPTY) | (words == _DELETED)
            best = _most(tl.where(same, 8 + column, tl.where(free, 4 - column, 0)))
            place = i * 4 + tl.where(best >= 8, best - 8, 4 - tl.maximum(best, 1))
            expected = _most(tl.where(column == (place & 3)[:, None], words, _NEVER))
            trying = active & (best > 0) & (best < 8)
            expected = tl.where(trying, expected, _NEVER)
            won = trying & (tl.atomic_cas(entries + 2 * place + 1, expected, -at + _CLAIMED, sem="relaxed") == expected)
            winner = winner | won
            settled = won | (active & (best >= 8))
            tl.store(places + at, place, mask=settled)
            i = tl.where(active & (best == 0), (i + 1) & mask, i)
            active = active & (settled == 0)
        count = winner.to(tl.int64)
        number = tl.atomic_add(counts + 3, tl.sum(count, 0), sem="relaxed") + tl.cumsum(count, 0) - count
        free_rows = tl.load(counts + 1)
        recycled = tl.load(freed + (free_rows - 1 - number), mask=winner & (number < free_rows), other=0).to(tl.int64)
        row = tl.where(winner, -2 - tl.where(number < free_rows, recycled, tl.load(counts) + number - free_rows), row)
    tl.store(rows + at, row.to(tl.int32), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def rehash(old, index, n, SHAPE: tl.constexpr):
    """Enter all of `old`, an index of `n` entries, in another one, which holds none of its keys."""
    entries, mask = index[0], index[1]
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    word = tl.load(old + 2 * at + 1, mask=at < n, other=_EMPTY)
    key = tl.load(old + 2 * at, mask=at < n, other=0)
    active = word >= 0
    i = _home(word >> 32, key, mask)
    column = tl.arange(0, 4)[None, :]
    while _any(active):
        words = _line(entries, i, active, ".cg")[1]
        best = _most(tl.where(words == _EMPTY, 4 - column, 0))
        place = i * 4 + 4 - tl.maximum(best, 1)
        trying = active & (best > 0)
        met = tl.atomic_cas(entries + 2 * place + 1, tl.where(trying, _EMPTY, _NEVER), word, sem="relaxed")
        won = trying & (met == _EMPTY)
        tl.store(entries + 2 * place, key, mask=won)
        i = tl.where(active & (best == 0), (i + 1) & mask, i)
        active = active & (won == 0)


@triton.jit(do_not_specialize=["n"])
def erase(index, batch, rows, n, SHAPE: tl.constexpr):
    """Take the keys of the lanes with a row out of the index; their entries can be claimed again."""
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    active = tl.load(rows + at, mask=at < n, other=-1) >= 0
    slot = tl.load(slots + at, mask=active, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=active, other=0)
    row, place = _probe(index, slot, key, active)
    tl.store(index[0] + 2 * place + 1, place * 0 + _DELETED, mask=active & (row >= 0))


@triton.jit(do_not_specialize=["n"])
def group(scratch, batch, active, places, n, SHAPE: tl.constexpr):
    """Give equal pairs one place [N] in the scratch `cells` (all -1), and each cell the first position of its pair.

    Which cell is a matter of race; what it holds in the end is not.
    """
    cells, mask = scratch
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    waiting = tl.load(active + at, mask=at < n, other=0) != 0
    slot = tl.load(slots + at, mask=waiting, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=waiting, other=0)
    i = _home(slot, key, mask)
    while _any(waiting):
        held = tl.atomic_cas(cells + i, tl.where(waiting, tl.zeros_like(at) - 1, -3), at, sem="relaxed")
        taken = waiting & (held >= 0)
        same = taken & (tl.load(keys + held, mask=taken, other=0) == key)
        same = same & (tl.load(slots + held, mask=taken, other=0).to(tl.int64) == slot)
        tl.atomic_min(cells + i, at, mask=same & (at < held), sem="relaxed")
        settled = same | (waiting & (held == -1))
        tl.store(places + at, i, mask=settled)
        waiting = waiting & (settled == 0)
        i = (i + 1) & mask


@triton.jit
def _tallies(sketch, batch, at, mask, seed, EACH: tl.constexpr):
    """Pointers [lanes, 4] to the counters of each lane's key in the filter, which has four rows of EACH."""
    slots, keys = batch
    slot = tl.load(slots + at, mask=mask, other=0).to(tl.int64).to(tl.uint64)
    key = tl.load(keys + at, mask=mask, other=0).to(tl.uint64)
    h = _mix(slot * 0xD1342543DE82EF95 + key + tl.load(seed).to(tl.uint64))
    row = tl.arange(0, 4).to(tl.uint64)[None, :]
    along = ((h & 0xFFFFFFFF)[:, None] + row * ((h >> 32) | 1)[:, None]) & 0xFFFFFFFF
    return sketch + (((along * EACH) >> 32) + row * EACH).to(tl.int64)


@triton.jit(do_not_specialize=["n"])
def tally(sketch, batch, wanted, seed, n, SHAPE: tl.constexpr):
    """Count each wanted lane in the filter. SHAPE: counters of a row, lanes."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[1] + tl.arange(0, SHAPE[1])
    live = tl.load(wanted + at, mask=at < n, other=0) != 0
    places = _tallies(sketch, batch, at, live, seed, SHAPE[0])
    one = tl.full((SHAPE[1], 4), 1, tl.int32)
    tl.atomic_add(places, one, mask=live[:, None] & (one > 0), sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def least(sketch, batch, wanted, out, seed, n, SHAPE: tl.constexpr):
    """The least counter [N] of each wanted lane, at most 255. SHAPE as in `tally`."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[1] + tl.arange(0, SHAPE[1])
    live = tl.load(wanted + at, mask=at < n, other=0) != 0
    counts = tl.load(_tallies(sketch, batch, at, live, seed, SHAPE[0]), mask=live[:, None], other=0)
    tl.store(out + at, tl.minimum(tl.reduce(counts, 1, tl.standard._elementwise_min), 255), mask=live)
