"""The loops of the CUDA table, in Triton. With TRITON_INTERPRET=1, set before Triton is first imported, the same kernels
run on CPU tensors: that is how machines without a device test them.

Legend: N keys of a call (`n`; one lane each), `entries` [size + 1, 2] is the index: key, and slot << 32 | row, or EMPTY or
DELETED; size is a power of two and `mask` is size - 1. A column is a list of chunks of rows that never move: kernels get
`chunks`, the address of each. A row below 0 means: skip this lane. SHAPE and LANES are known when a kernel is compiled.

Inside `while`, `tl.reduce` stands in for `tl.max`: the interpreter would set itself up anew at every call of the latter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton resolves every name of a kernel's signature when it compiles, so tensors cannot be annotated.

from __future__ import annotations

import triton
import triton.language as tl

EMPTY, DELETED = -1, -2
SGD, ADAGRAD, ROWWISE_ADAGRAD = 0, 1, 2
TILE = 256
"""Gradients of one row summed one after another; half halves the wait for one very frequent key's sums and doubles their
number. Both loops of the most frequent key of a million Zipf keys then take about as long."""

_EMPTY, _DELETED, _TILE = tl.constexpr(EMPTY), tl.constexpr(DELETED), tl.constexpr(TILE)
_ADAGRAD, _ROWWISE_ADAGRAD = tl.constexpr(ADAGRAD), tl.constexpr(ROWWISE_ADAGRAD)


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
def _probe(index, slot, key, active):
    """Position of the entry and row of each active (slot, key), -1 where there is none."""
    entries, mask = index
    i = _home(slot, key, mask)
    position = i * 0 - 1
    row = position
    while tl.reduce(active.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        held = tl.load(entries + 2 * i, mask=active, other=0)
        word = tl.load(entries + 2 * i + 1, mask=active, other=_EMPTY)
        hit = active & (held == key) & (word >> 32 == slot)  # a negative word has slot -1, which no key has
        position = tl.where(hit, i, position)
        row = tl.where(hit, word & 0xFFFFFFFF, row)
        active = active & (word != _EMPTY) & (hit == 0)
        i = (i + 1) & mask
    return position, row


@triton.jit
def _address(chunks, row, of, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the first value of each row (row >= 0), of the type that `of` points to."""
    # Allocations are 256-byte aligned; Triton cannot know that of an address it loads, and would copy word by word.
    base = tl.load(chunks + row // CHUNK).to(tl.pointer_type(of.dtype.element_ty))
    return tl.multiple_of(base, 16) + (row % CHUNK) * WIDTH


@triton.jit(do_not_specialize=["n"])
def find(index, batch, fallback, rows, n, LANES: tl.constexpr):
    """Rows [N] of the keys; `fallback[slot]` where missing, -1 for a slot that has none. `fallback` is [65536]."""
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    slot = tl.load(slots + at, mask=at < n, other=-1).to(tl.int64)
    otherwise = tl.load(fallback + slot, mask=(slot >= 0) & (slot < 65536), other=-1)
    key = tl.load(keys + at, mask=otherwise >= 0, other=0)
    _, row = _probe(index, slot, key, otherwise >= 0)
    tl.store(rows + at, tl.where(row >= 0, row.to(tl.int32), otherwise), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def lookup(index, batch, fallback, chunks, results, n, SHAPE: tl.constexpr):
    """`find` and `gather` in one: `results` are rows [N] and values [N, D]. SHAPE: rows of a chunk, D, padded, lanes."""
    CHUNK: tl.constexpr = SHAPE[0]
    DIM: tl.constexpr = SHAPE[1]
    LANES: tl.constexpr = SHAPE[3]
    slots, keys = batch
    rows, out = results
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    slot = tl.load(slots + at, mask=at < n, other=-1).to(tl.int64)
    otherwise = tl.load(fallback + slot, mask=(slot >= 0) & (slot < 65536), other=-1)
    key = tl.load(keys + at, mask=otherwise >= 0, other=0)
    _, row = _probe(index, slot, key, otherwise >= 0)
    row = tl.where(row >= 0, row, otherwise.to(tl.int64))
    tl.store(rows + at, row.to(tl.int32), mask=at < n)
    column = tl.arange(0, SHAPE[2])
    live = (row >= 0)[:, None] & (column < DIM)[None, :]
    source = _address(chunks, tl.where(row >= 0, row, 0), out, CHUNK, DIM)[:, None] + column[None, :]
    values = tl.load(source, mask=live, other=float("nan"))
    tl.store(out + at[:, None] * DIM + column[None, :], values, mask=(at < n)[:, None] & (column < DIM)[None, :])


@triton.jit(do_not_specialize=["n"])
def gather(chunks, rows, out, n, SHAPE: tl.constexpr):
    """`out` [N, D] gets the rows; a skipped lane's is left as it is. SHAPE as in `lookup`."""
    DIM: tl.constexpr = SHAPE[1]
    at = tl.program_id(0).to(tl.int64) * SHAPE[3] + tl.arange(0, SHAPE[3])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    column = tl.arange(0, SHAPE[2])
    live = (row >= 0)[:, None] & (column < DIM)[None, :]
    source = _address(chunks, tl.where(row >= 0, row, 0), out, SHAPE[0], DIM)[:, None] + column[None, :]
    tl.store(out + at[:, None] * DIM + column[None, :], tl.load(source, mask=live, other=0), mask=live)


@triton.jit(do_not_specialize=["n"])
def scatter(chunks, rows, values, n, SHAPE: tl.constexpr):
    """The rows get `values` [N, D]; rows are unique. SHAPE as in `lookup`."""
    DIM: tl.constexpr = SHAPE[1]
    at = tl.program_id(0).to(tl.int64) * SHAPE[3] + tl.arange(0, SHAPE[3])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    column = tl.arange(0, SHAPE[2])
    live = (row >= 0)[:, None] & (column < DIM)[None, :]
    target = _address(chunks, tl.where(row >= 0, row, 0), values, SHAPE[0], DIM)[:, None] + column[None, :]
    tl.store(target, tl.load(values + at[:, None] * DIM + column[None, :], mask=live, other=0), mask=live)


@triton.jit(do_not_specialize=["n", "first", "now", "version"])
def see(meta, rows, first, now, version, n, SHAPE: tl.constexpr):
    """Move last-seen on to `now`, and with `version` > 0 mark as changed then; rows below `first` are left alone.

    Duplicates write the same, so their race has one outcome. SHAPE: rows of a chunk, lanes.
    """
    at = tl.program_id(0).to(tl.int64) * SHAPE[1] + tl.arange(0, SHAPE[1])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    live = row >= first
    base = _address(meta, tl.where(live, row, 0), meta, SHAPE[0], 4)
    seen = tl.load(base + 2, mask=live, other=0)
    tl.store(base + 2, tl.maximum(seen, now), mask=live)
    if version > 0:
        tl.store(base + 3, row * 0 + version, mask=live)


@triton.jit(do_not_specialize=["n"])
def claim(index, batch, rows, n, LANES: tl.constexpr):
    """Enter rows [N] for keys that are unique and not in the index: so any free entry will do, and no key is compared."""
    entries, mask = index
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    active = row >= 0
    slot = tl.load(slots + at, mask=active, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=active, other=0)
    i = _home(slot, key, mask)
    while tl.reduce(active.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        word = tl.load(entries + 2 * i + 1, mask=active, other=0)
        # A compare-and-swap takes no mask: a lane that must not write expects what no entry holds.
        old = tl.atomic_cas(
            entries + 2 * i + 1, tl.where(active & (word < 0), word, -3), slot << 32 | row, sem="relaxed"
        )
        won = active & (word < 0) & (old == word)
        tl.store(entries + 2 * i, key, mask=won)
        active = active & (won == 0)
        i = (i + 1) & mask


@triton.jit(do_not_specialize=["n"])
def erase(index, batch, rows, n, LANES: tl.constexpr):
    """Take the keys of the lanes with a row out of the index; their entries can be claimed again."""
    entries, _ = index
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    active = tl.load(rows + at, mask=at < n, other=-1) >= 0
    slot = tl.load(slots + at, mask=active, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=active, other=0)
    position, _ = _probe(index, slot, key, active)
    tl.store(entries + 2 * position + 1, tl.zeros_like(position) + _DELETED, mask=position >= 0)


@triton.jit(do_not_specialize=["n"])
def group(scratch, batch, active, places, n, LANES: tl.constexpr):
    """Give equal pairs one place [N] in the scratch `cells` (all -1), and each cell the first position of its pair.

    Which cell is a matter of race; what it holds in the end is not.
    """
    cells, mask = scratch
    slots, keys = batch
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    waiting = tl.load(active + at, mask=at < n, other=0) != 0
    slot = tl.load(slots + at, mask=waiting, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=waiting, other=0)
    i = _home(slot, key, mask)
    while tl.reduce(waiting.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        held = tl.atomic_cas(cells + i, tl.where(waiting, tl.zeros_like(at) - 1, -3), at, sem="relaxed")
        taken = waiting & (held >= 0)
        same = taken & (tl.load(keys + held, mask=taken, other=0) == key)
        same = same & (tl.load(slots + held, mask=taken, other=0).to(tl.int64) == slot)
        tl.atomic_min(cells + i, at, mask=same & (at < held), sem="relaxed")
        settled = same | (waiting & (held == -1))
        tl.store(places + at, i, mask=settled)
        waiting = waiting & (settled == 0)
        i = (i + 1) & mask


@triton.jit(do_not_specialize=["n"])
def initialise(columns, batch, rows, start, n, SHAPE: tl.constexpr):
    """New rows, bit for bit as `rows.initial_values`. `start`: mixed seed, scale [D], fresh state [S].

    SHAPE: rows of a chunk, D, padded, lanes, S, padded.
    """
    CHUNK: tl.constexpr = SHAPE[0]
    DIM: tl.constexpr = SHAPE[1]
    STATE: tl.constexpr = SHAPE[4]
    values, states = columns
    slots, keys = batch
    seed, scales, fresh = start
    at = tl.program_id(0).to(tl.int64) * SHAPE[3] + tl.arange(0, SHAPE[3])
    row = tl.load(rows + at, mask=at < n, other=-1).to(tl.int64)
    live = row >= 0
    slot = tl.load(slots + at, mask=live, other=0).to(tl.int64)
    key = tl.load(keys + at, mask=live, other=0)
    hashed = _mix(_mix(slot.to(tl.uint64) + tl.load(seed).to(tl.uint64)) + key.to(tl.uint64))
    column = tl.arange(0, SHAPE[2])
    half: tl.constexpr = (DIM + 1) // 2  # of 64 bits of hash, a value of each half of the row takes 24
    mixed = _mix(hashed[:, None] + (column - tl.where(column < half, 0, half))[None, :].to(tl.uint64))
    bits = tl.where((column < half)[None, :], mixed >> 40, (mixed >> 8) & 0xFFFFFF)
    scale = tl.load(scales + column, mask=column < DIM, other=0)
    # 24 bits fit a float32 exactly: the only rounding is the product with the scale.
    drawn = (bits.to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0) * scale[None, :]
    row = tl.where(live, row, 0)
    target = _address(values, row, scales, CHUNK, DIM)[:, None] + column[None, :]
    tl.store(target, drawn, mask=live[:, None] & (column < DIM)[None, :])
    if STATE > 0:
        column = tl.arange(0, SHAPE[5])
        begin = tl.load(fresh + column, mask=column < STATE, other=0)
        target = _address(states, row, fresh, CHUNK, STATE)[:, None] + column[None, :]
        known = live[:, None] & (column < STATE)[None, :]
        tl.store(target, tl.broadcast_to(begin[None, :], (SHAPE[3], SHAPE[5])), mask=known)


@triton.jit(do_not_specialize=["size"])
def refuse(gradients, refused, bound, size, LANES: tl.constexpr):
    """Set `refused` if any of `size` numbers is not finite or larger than `bound`."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    wrong = (tl.abs(tl.load(gradients + at, mask=at < size, other=0)) <= bound) == 0
    if tl.reduce(wrong.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        tl.store(refused, 1)


@triton.jit(do_not_specialize=["n"])
def presum(ordered, gradients, sums, n, SHAPE: tl.constexpr):
    """Sums [N / TILE, D] of each tile's first gradients, where they belong to the row that the tile before ended with.

    `ordered`: rows in order, and the position of each in the batch. SHAPE: D, padded, lanes.
    """
    rows, positions = ordered
    DIM: tl.constexpr = SHAPE[0]
    tile = tl.program_id(0).to(tl.int64) * SHAPE[2] + tl.arange(0, SHAPE[2])
    at = tile * _TILE
    row = tl.load(rows + at, mask=at < n, other=-1)
    active = (row >= 0) & (tl.load(rows + at - 1, mask=(at > 0) & (at < n), other=-1) == row)
    column = tl.arange(0, SHAPE[1])
    known = (column < DIM)[None, :]
    live = active[:, None] & known
    total = tl.full((SHAPE[2], SHAPE[1]), 0, tl.float64)
    while tl.reduce(active.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        source = gradients + tl.load(positions + at, mask=active, other=0)[:, None] * DIM + column[None, :]
        total += tl.load(source, mask=active[:, None] & known, other=0).to(tl.float64)
        at += 1
        active = active & (at % _TILE != 0) & (tl.load(rows + at, mask=active & (at < n), other=-1) == row)
    tl.store(sums + tile[:, None] * DIM + column[None, :], total, mask=live)


@triton.jit(do_not_specialize=["n"])
def step(ordered, gradients, columns, rates, n, SHAPE: tl.constexpr):
    """One optimiser step of one segment of each row, formulas as in `optimizers.step`: duplicates are summed first, in order.

    `gradients`: [N, D], `presum`'s sums, refused. `rates`: rate, epsilon (float64). SHAPE: rows of a chunk, D, S, start of
    the segment, its width, padded, start of its state, optimiser, lanes.
    """
    rows, positions = ordered
    given, sums, refused = gradients
    values, states = columns
    CHUNK: tl.constexpr = SHAPE[0]
    WIDTH: tl.constexpr = SHAPE[1]
    LANES: tl.constexpr = SHAPE[8]
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = tl.load(rows + at, mask=at < n, other=-1)
    head = (row >= 0) & (tl.load(rows + at - 1, mask=(at > 0) & (at < n), other=-1) != row)
    head = head & (tl.load(refused + at * 0) == 0)  # a scalar would do, but not in the interpreter
    column = SHAPE[3] + tl.arange(0, SHAPE[5])
    known = (tl.arange(0, SHAPE[5]) < SHAPE[4])[None, :]
    total = tl.full((LANES, SHAPE[5]), 0, tl.float64)
    active = head
    while tl.reduce(active.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        source = given + tl.load(positions + at, mask=active, other=0)[:, None] * WIDTH + column[None, :]
        total += tl.load(source, mask=active[:, None] & known, other=0).to(tl.float64)
        at += active.to(tl.int64)
        active = active & (at % _TILE != 0) & (tl.load(rows + at, mask=active & (at < n), other=-1) == row)
    active = head & (at % _TILE == 0) & (tl.load(rows + at, mask=head & (at < n), other=-1) == row)
    while tl.reduce(active.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        source = sums + (at // _TILE)[:, None] * WIDTH + column[None, :]
        total += tl.load(source, mask=active[:, None] & known, other=0)
        at += _TILE
        active = active & (tl.load(rows + at, mask=active & (at < n), other=-1) == row)
    g = total.to(tl.float32).to(tl.float64)
    row = tl.where(head, row, 0).to(tl.int64)
    rate = tl.load(rates)
    live = head[:, None] & known
    if SHAPE[7] == _ROWWISE_ADAGRAD:
        place = _address(states, row, given, CHUNK, SHAPE[2]) + SHAPE[6]
        squares = (
            tl.load(place, mask=head, other=1).to(tl.float64) + tl.reduce(g * g, 1, tl.standard._sum_combine) / SHAPE[4]
        )
        tl.store(place, squares.to(tl.float32), mask=head)
        rate = (rate / (tl.sqrt(squares) + tl.load(rates + 1)))[:, None]
    if SHAPE[7] == _ADAGRAD:
        place = _address(states, row, given, CHUNK, SHAPE[2])[:, None] + (SHAPE[6] - SHAPE[3]) + column[None, :]
        squares = tl.load(place, mask=live, other=1).to(tl.float64) + g * g
        tl.store(place, squares.to(tl.float32), mask=live)
        rate = rate / (tl.sqrt(squares) + tl.load(rates + 1))
    target = _address(values, row, given, CHUNK, WIDTH)[:, None] + column[None, :]
    moved = tl.load(target, mask=live, other=0).to(tl.float64) - rate * g
    tl.store(target, moved.to(tl.float32), mask=live)
