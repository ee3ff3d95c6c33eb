"""Making, reading and changing rows of the CUDA table, in Triton.

Legend: as in `triton_index`; D values of a row. A column is a list of chunks of rows that never move: kernels get the address
of each. A record [W] is a row's optimiser state [S] (float32 bits), when it was last seen, when it was changed, and how often it
was seen.

`stamp` is version << 32 | time. SHAPE, known when a kernel is compiled, is of the table: rows of a chunk, D, the next power
of two, kind of number, W, S, the next power of two, default rows; then lanes of a program, and whether to mark as changed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from recsys.table.triton_index import CLAIMED, _any, _find, _mix

BLOCK = 1024
"""Lanes that a program of `settle` looks at together."""
FLOAT32, FLOAT16, BFLOAT16, INT32, INT64 = range(5)

_BLOCK, _CLAIMED = tl.constexpr(BLOCK), tl.constexpr(CLAIMED)
_FLOAT32, _FLOAT16, _BFLOAT16 = tl.constexpr(FLOAT32), tl.constexpr(FLOAT16), tl.constexpr(BFLOAT16)
_INT32 = tl.constexpr(INT32)


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
        start = base.to(tl.pointer_type(tl.int16))
    elif KIND == _INT32:
        start = base.to(tl.pointer_type(tl.int32))
    else:
        start = base.to(tl.pointer_type(tl.int64))
    return tl.multiple_of(start, 16) + offset


@triton.jit
def _decoded(stored, KIND: tl.constexpr):
    """Stored values as float32."""
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True) if KIND == _BFLOAT16 else stored.to(tl.float32)


@triton.jit
def _clipped(value, KIND: tl.constexpr):
    largest: tl.constexpr = 65504.0 if KIND == _FLOAT16 else 3.3895313892515355e38
    return tl.minimum(tl.maximum(value, -largest), largest)


@triton.jit
def _nearest(value, KIND: tl.constexpr):
    """A float32 as it is stored: as the nearest of its kind, ties to even; the largest finite one if larger."""
    if KIND == _FLOAT16:
        stored = _clipped(value, KIND).to(tl.float16)
    elif KIND == _BFLOAT16:
        bits = _clipped(value, KIND).to(tl.uint32, bitcast=True)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        stored = value
    return stored


@triton.jit
def _values(chunks, row, SHAPE: tl.constexpr):
    """Pointers [lanes, padded D] to the values of each row (row >= 0)."""
    return _address(chunks, row, SHAPE[0], SHAPE[1], SHAPE[3])[:, None] + tl.arange(0, SHAPE[2])[None, :]


@triton.jit(do_not_specialize=["n"])
def lookup(index, batch, values, results, n, SHAPE: tl.constexpr):
    """Rows [N] and values [N, D] of the keys, NaN for a slot that has none."""
    rows, out = results
    at = tl.program_id(0).to(tl.int64) * SHAPE[8] + tl.arange(0, SHAPE[8])
    row = _find(index, batch, at, n)
    tl.store(rows + at, row.to(tl.int32), mask=at < n)
    column = tl.arange(0, SHAPE[2])[None, :]
    source = _values(values, tl.where(row >= 0, row, 0), SHAPE)
    live = (row >= 0)[:, None] & (column < SHAPE[1])
    numbers = tl.where(live, _decoded(tl.load(source, mask=live, other=0), SHAPE[3]), float("nan"))
    known = (at < n)[:, None] & (column < SHAPE[1])
    tl.store(out + at[:, None] * SHAPE[1] + column, numbers, mask=known)


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
    numbers = tl.load(start[:, None] + column, mask=live, other=0)
    if SHAPE[5] < _INT32:
        numbers = tl.where(live, _decoded(numbers, SHAPE[5]), float("nan"))
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
    tl.store(target[:, None] + column, _nearest(given, SHAPE[5]), mask=live)


@triton.jit(do_not_specialize=["stamp", "n"])
def settle(index, batch, claims, columns, stamp, n, SHAPE: tl.constexpr):
    """Make the rows that `enter` claimed, as new (bit for bit as `rows.initial_values`), tell them to all lanes with such a
    key, and count them. `columns`: values, records, mixed seed, scales [default rows, D],
    fresh state [S].

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
            default = tl.load(index[2] + slot, mask=winner, other=0)
            _initialise(columns, (slot, key), default, tl.where(winner, new, -1), stamp, SHAPE)


@triton.jit
def _initialise(columns, batch, place, row, stamp, SHAPE: tl.constexpr):
    """`batch`: slot and key of each lane. `place`: its slot's default row, hence its line of the scales."""
    values, records, seed, scales, fresh = columns
    slot, key = batch
    live = row >= 0
    row = tl.where(live, row, 0)
    hashed = _mix(_mix(slot.to(tl.uint64) + tl.load(seed).to(tl.uint64)) + key.to(tl.uint64))
    column = tl.arange(0, SHAPE[2])[None, :]
    half: tl.constexpr = (SHAPE[1] + 1) // 2  # of 64 bits of hash, a value of each half of the row takes 24
    mixed = _mix(hashed[:, None] + (column - tl.where(column < half, 0, half)).to(tl.uint64))
    bits = tl.where(column < half, mixed >> 40, (mixed >> 8) & 0xFFFFFF)
    known = live[:, None] & (column < SHAPE[1])
    scale = tl.load(scales + place[:, None] * SHAPE[1] + column, mask=known, other=0)
    # 24 bits fit a float32 exactly: the only rounding is the product with the scale.
    drawn = (bits.to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0) * scale
    tl.store(_values(values, row, SHAPE), _nearest(drawn, SHAPE[3]), mask=known)
    record = _address(records, row, SHAPE[0], SHAPE[4], _INT32)
    if SHAPE[5] > 0:
        column = tl.arange(0, SHAPE[6])
        begin = tl.load(fresh + column, mask=column < SHAPE[5], other=0).to(tl.int32, bitcast=True)[None, :]
        target = record[:, None] + column[None, :]
        tl.store(target, begin + row.to(tl.int32)[:, None] * 0, mask=live[:, None] & (column < SHAPE[5])[None, :])
    tl.store(record + SHAPE[5], (stamp & 0xFFFFFFFF).to(tl.int32) + row.to(tl.int32) * 0, mask=live)
    tl.store(record + SHAPE[5] + 1, (stamp >> 32).to(tl.int32) + row.to(tl.int32) * 0, mask=live)
    tl.store(record + SHAPE[5] + 2, row.to(tl.int32) * 0, mask=live)


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
