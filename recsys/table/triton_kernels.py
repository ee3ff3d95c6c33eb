"""Finding, making and reading rows of the CUDA table, in Triton. With TRITON_INTERPRET=1, set before Triton is first
imported, the same kernels run on CPU tensors: that is how machines without a device test them.

Legend: N keys of a call (`n`; one lane each), D values of a row. The index is (`entries`, `mask`, `fallback`): lines of
four entries, each a key and slot << 32 | row (or EMPTY, DELETED, or CLAIMED - lane while a call makes rows); the number of
lines is a power of two, `mask` one less; `fallback` [65536] is each slot's default row. A column is a list of chunks of
rows that never move: kernels get the address of each. A record [W] is a row's optimiser state [S] (float32 bits), when it
was last seen, and when it was changed. A row below 0 means: skip this lane.

`stamp` is version << 32 | time. SHAPE, known when a kernel is compiled, is of the table: rows of a chunk, D, the next power
of two, kind of number, W, S, the next power of two, default rows; then lanes of a program, and whether to mark as changed.

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
BLOCK = 1024
"""Lanes that a program of `settle` looks at together."""
FLOAT32, FLOAT16, BFLOAT16, INT32, INT64 = range(5)

_EMPTY, _DELETED, _CLAIMED = tl.constexpr(EMPTY), tl.constexpr(DELETED), tl.constexpr(CLAIMED)
_BLOCK = tl.constexpr(BLOCK)
_NEVER = tl.constexpr(-(2**62))
"""A word that no entry ever holds: a compare-and-swap takes no mask, so lanes that must not write expect this."""
_FLOAT32, _FLOAT16, _BFLOAT16 = tl.constexpr(FLOAT32), tl.constexpr(FLOAT16), tl.constexpr(BFLOAT16)
_INT32 = tl.constexpr(INT32)


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


@triton.jit
def _address(chunks, row, CHUNK: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Pointer to the first number of each row (row >= 0)."""
    # Allocations are 256-byte aligned; Triton cannot know that of an address it loads, and would copy word by word.
    base = tl.load(chunks + row // CHUNK)
    offset = (row % CHUNK) * WIDTH
    if KIND == _FLOAT32:
        start = base.to(tl.pointer_type(tl.float32))
    elif KIND == _FLOAT16:
        start = base.to(tl.pointer_type(tl.float16))
    elif KIND == _BFLOAT16:
        start = base.to(tl.pointer_type(tl.bfloat16))
    elif KIND == _INT32:
        start = base.to(tl.pointer_type(tl.int32))
    else:
        start = base.to(tl.pointer_type(tl.int64))
    return tl.multiple_of(start, 16) + offset


@triton.jit
def _values(chunks, row, SHAPE: tl.constexpr):
    """Pointers [lanes, padded D] to the values of each row (row >= 0)."""
    return _address(chunks, row, SHAPE[0], SHAPE[1], SHAPE[3])[:, None] + tl.arange(0, SHAPE[2])[None, :]


@triton.jit(do_not_specialize=["n"])
def find(index, batch, rows, n, SHAPE: tl.constexpr):
    """Rows [N] of the keys."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    tl.store(rows + at, _find(index, batch, at, n).to(tl.int32), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def lookup(index, batch, values, results, n, SHAPE: tl.constexpr):
    """Rows [N] and values [N, D] of the keys, NaN for a slot that has none."""
    rows, out = results
    at = tl.program_id(0).to(tl.int64) * SHAPE[8] + tl.arange(0, SHAPE[8])
    row = _find(index, batch, at, n)
    tl.store(rows + at, row.to(tl.int32), mask=at < n)
    column = tl.arange(0, SHAPE[2])[None, :]
    source = _values(values, tl.where(row >= 0, row, 0), SHAPE)
    numbers = tl.load(source, mask=(row >= 0)[:, None] & (column < SHAPE[1]), other=float("nan"))
    known = (at < n)[:, None] & (column < SHAPE[1])
    tl.store(out + at[:, None] * SHAPE[1] + column, numbers.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["n"])
def gather(chunks, rows, out, n, SHAPE: tl.constexpr):
    """`out` [N, M] gets numbers of rows; NaN, or 0, for rows below 0. SHAPE: rows of a chunk, width, start, M, padded, kind,
    lanes."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[6] + tl.arange(0, SHAPE[6])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    column = tl.arange(0, SHAPE[4])[None, :]
    live = (row >= 0)[:, None] & (column < SHAPE[3])
    start = _address(chunks, tl.where(row >= 0, row, 0), SHAPE[0], SHAPE[1], SHAPE[5]) + SHAPE[2]
    known = (at < n)[:, None] & (column < SHAPE[3])
    if out.dtype.element_ty == tl.float32:
        numbers = tl.load(start[:, None] + column, mask=live, other=float("nan")).to(tl.float32)
    else:
        numbers = tl.load(start[:, None] + column, mask=live, other=0)
    tl.store(out + at[:, None] * SHAPE[3] + column, numbers, mask=known)


@triton.jit(do_not_specialize=["n"])
def scatter(chunks, rows, numbers, n, SHAPE: tl.constexpr):
    """Unique rows get `numbers` [N, M]. SHAPE as in `gather`."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[6] + tl.arange(0, SHAPE[6])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    column = tl.arange(0, SHAPE[4])[None, :]
    live = (row >= 0)[:, None] & (column < SHAPE[3])
    target = _address(chunks, tl.where(row >= 0, row, 0), SHAPE[0], SHAPE[1], SHAPE[5]) + SHAPE[2]
    given = tl.load(numbers + at[:, None] * SHAPE[3] + column, mask=live, other=0)
    tl.store(target[:, None] + column, given, mask=live)


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


@triton.jit(do_not_specialize=["stamp", "n"])
def settle(index, batch, claims, columns, stamp, n, SHAPE: tl.constexpr):
    """Make the rows that `enter` claimed, as new (bit for bit as `rows.initial_values`), tell them to all lanes with such a
    key, and count them. `columns`: values, records, mixed seed, scale [D], fresh state [S].

    A program looks at BLOCK lanes at once: usually that is all there is to do.
    """
    rows, counts = claims[0], claims[2]
    begin = tl.program_id(0).to(tl.int64) * _BLOCK
    at = begin + tl.arange(0, _BLOCK)
    row = tl.load(rows + at, mask=at < n, other=-1)
    if _any((row < -1) | ((row >= 0) & (row < SHAPE[7]))):
        end = tl.minimum(begin + _BLOCK, n)
        while begin < end:
            _settle(index, batch, claims, columns, stamp, (begin, end), SHAPE)
            begin += SHAPE[8]
    if tl.program_id(0) == 0:
        made, free = tl.load(counts + 3), tl.load(counts + 1)
        used = tl.minimum(made, free)
        tl.store(counts, tl.load(counts) + made - used)
        tl.store(counts + 1, free - used)
        tl.store(counts + 3, made * 0)


@triton.jit
def _settle(index, batch, claims, columns, stamp, span, SHAPE: tl.constexpr):
    entries = index[0]
    at = span[0] + tl.arange(0, SHAPE[8])
    rows, places = claims[0], claims[1]
    slots, keys = batch
    row = tl.load(rows + at, mask=at < span[1], other=-1).to(tl.int64)
    winner = row < -1
    loser = (row >= 0) & (row < SHAPE[7])
    if _any(winner | loser):
        place = tl.load(places + at, mask=winner | loser, other=0)
        # The winner may be here before or after: the word names its lane or its row, and its lane its row either way.
        word = tl.load(entries + 2 * place + 1, mask=loser, other=0)
        theirs = tl.load(rows - word + _CLAIMED, mask=loser & (word < 0), other=0).to(tl.int64)
        theirs = tl.where(word >= 0, word & 0xFFFFFFFF, tl.where(theirs < -1, -2 - theirs, theirs))
        new = tl.where(winner, -2 - row, theirs)
        tl.store(rows + at, new.to(tl.int32), mask=winner | loser)
        slot = tl.load(slots + at, mask=winner, other=0).to(tl.int64)
        key = tl.load(keys + at, mask=winner, other=0)
        tl.store(entries + 2 * place, key, mask=winner)
        tl.store(entries + 2 * place + 1, slot << 32 | new, mask=winner)
        if SHAPE[1] > 0:
            _initialise(columns, slot, key, tl.where(winner, new, -1), stamp, SHAPE)


@triton.jit
def _initialise(columns, slot, key, row, stamp, SHAPE: tl.constexpr):
    values, records, seed, scales, fresh = columns
    live = row >= 0
    row = tl.where(live, row, 0)
    hashed = _mix(_mix(slot.to(tl.uint64) + tl.load(seed).to(tl.uint64)) + key.to(tl.uint64))
    column = tl.arange(0, SHAPE[2])
    half: tl.constexpr = (SHAPE[1] + 1) // 2  # of 64 bits of hash, a value of each half of the row takes 24
    mixed = _mix(hashed[:, None] + (column - tl.where(column < half, 0, half))[None, :].to(tl.uint64))
    bits = tl.where((column < half)[None, :], mixed >> 40, (mixed >> 8) & 0xFFFFFF)
    scale = tl.load(scales + column, mask=column < SHAPE[1], other=0)
    # 24 bits fit a float32 exactly: the only rounding is the product with the scale.
    drawn = (bits.to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0) * scale[None, :]
    tl.store(_values(values, row, SHAPE), drawn, mask=live[:, None] & (column < SHAPE[1])[None, :])
    record = _address(records, row, SHAPE[0], SHAPE[4], _INT32)
    if SHAPE[5] > 0:
        column = tl.arange(0, SHAPE[6])
        begin = tl.load(fresh + column, mask=column < SHAPE[5], other=0).to(tl.int32, bitcast=True)[None, :]
        target = record[:, None] + column[None, :]
        tl.store(target, begin + row.to(tl.int32)[:, None] * 0, mask=live[:, None] & (column < SHAPE[5])[None, :])
    tl.store(record + SHAPE[5], (stamp & 0xFFFFFFFF).to(tl.int32) + row.to(tl.int32) * 0, mask=live)
    tl.store(record + SHAPE[5] + 1, (stamp >> 32).to(tl.int32) + row.to(tl.int32) * 0, mask=live)


@triton.jit(do_not_specialize=["stamp", "n"])
def see(records, rows, stamp, n, SHAPE: tl.constexpr):
    """Move last-seen of rows on, and perhaps mark them as changed; default rows are left alone.

    Duplicates write the same, so their race has one outcome.
    """
    at = tl.program_id(0).to(tl.int64) * SHAPE[8] + tl.arange(0, SHAPE[8])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    live = row >= SHAPE[7]
    seen = _address(records, tl.where(live, row, 0), SHAPE[0], SHAPE[4], _INT32) + SHAPE[5]
    now = (stamp & 0xFFFFFFFF).to(tl.int32)
    tl.store(seen, tl.maximum(tl.load(seen, mask=live, other=0), now), mask=live)
    if SHAPE[9]:
        tl.store(seen + 1, (stamp >> 32).to(tl.int32) + row.to(tl.int32) * 0, mask=live)


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
