"""Training the CUDA table's rows, in Triton: sum what is of one row, then one step of its optimisers.

Legend and SHAPE as in `triton_kernels`. `ordered`: rows in order [N], and the position of each in the batch: so equal rows
are neighbours, in order of occurrence. No sum depends on a race.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from recsys.table.triton_index import _any, _mix
from recsys.table.triton_kernels import FLOAT16, INT32, _address, _clipped, _decoded, _nearest

SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL = range(5)
NEAREST, STOCHASTIC, COUNTED = range(3)
"""How values are rounded; COUNTED: stochastically, and this step of the row is counted."""
TILE = 256
"""Gradients of one row that one lane sums; what goes beyond is summed by tiles, all at once. Half halves the wait for the
most frequent key's tile and doubles that for its number of tiles: for a million Zipf keys both take about as long."""
_TILE = tl.constexpr(TILE)
_INT32 = tl.constexpr(INT32)
_ADAGRAD, _ROWWISE_ADAGRAD = tl.constexpr(ADAGRAD), tl.constexpr(ROWWISE_ADAGRAD)
_ADAM, _FTRL, _FLOAT16 = tl.constexpr(ADAM), tl.constexpr(FTRL), tl.constexpr(FLOAT16)
_NEAREST, _COUNTED = tl.constexpr(NEAREST), tl.constexpr(COUNTED)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["size"])
def refuse(gradients, refused, bound, size, SHAPE: tl.constexpr):
    """Set `refused` if any of `size` numbers is not finite or larger than `bound`. SHAPE: lanes."""
    at = tl.program_id(0).to(tl.int64) * SHAPE[0] + tl.arange(0, SHAPE[0])
    wrong = (tl.abs(tl.load(gradients + at, mask=at < size, other=0)) <= bound) == 0
    if _any(wrong):
        tl.store(refused, 1)


@triton.jit
def _head(rows, at, n):
    """Each lane's row, whether it is the first of its row, and whether the next lane is of the same."""
    row = tl.load(rows + at, mask=at < n, other=-1)
    head = (row >= 0) & (tl.load(rows + at - 1, mask=(at > 0) & (at < n), other=-1) != row)
    return row, head, head & (tl.load(rows + at + 1, mask=at + 1 < n, other=-1) == row)


@triton.jit(do_not_specialize=["n"])
def presum(ordered, gradients, sums, frequent, n, SHAPE: tl.constexpr):
    """Sums [N / TILE, D] of each tile's first gradients, where they belong to the row that the tile before ended with; and
    in `frequent`, whose number is counted, the heads of rows that occur more than twice, in any order.

    SHAPE: D, padded, gradients at once.
    """
    rows, positions = ordered
    heads, count = frequent
    tile = tl.program_id(0).to(tl.int64)
    begin = tile * _TILE
    at = begin + tl.arange(0, _TILE)
    first, _, more = _head(rows, at, n)
    more = more & (tl.load(rows + at + 2, mask=at + 2 < n, other=-1) == first)
    if _any(more):
        number = tl.atomic_add(count, tl.sum(more.to(tl.int32), 0), sem="relaxed")
        tl.store(heads + number + tl.cumsum(more.to(tl.int32), 0) - 1, at, mask=more)
    row = tl.load(rows + begin)
    before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    if (row >= 0) & (row == before):
        column = tl.arange(0, SHAPE[1])
        known = column < SHAPE[0]
        total = tl.full((SHAPE[1],), 0, tl.float64)
        following = begin + tl.arange(0, SHAPE[2])
        mine = tl.load(rows + following, mask=following < n, other=-1) == row
        while _any(mine):
            position = tl.load(positions + following, mask=mine, other=0).to(tl.int64)
            source = gradients + position[:, None] * SHAPE[0] + column[None, :]
            given = tl.load(source, mask=mine[:, None] & known[None, :], other=0).to(tl.float64)
            total += tl.reduce(given, 0, tl.standard._sum_combine)
            following += SHAPE[2]
            inside = (following < n) & (following < begin + _TILE)
            mine = mine & (tl.load(rows + following, mask=inside, other=-1) == row)
        tl.store(sums + tile * SHAPE[0] + column, total, mask=known)


@triton.jit
def _over_root(number, squares, epsilon):
    """number / (√squares + ε), to 13 digits: by float32's reciprocals, and a step of Newton's each. With float64's own square
    root and division the memory would wait for them."""
    large = squares > 1e36
    scaled = tl.where(large, tl.minimum(squares, 1e80) * 2.0**-200, tl.maximum(squares, 1e-36))
    inverse = tl.rsqrt(scaled.to(tl.float32)).to(tl.float64)
    inverse = inverse * (1.5 - 0.5 * scaled * inverse * inverse)
    below = scaled * inverse * tl.where(large, 2.0**100, 1.0) + epsilon
    inverse = (1.0 / below.to(tl.float32)).to(tl.float64)
    return number * (inverse * (2.0 - below * inverse))


@triton.jit(do_not_specialize=["n"])
def combine(ordered, gradients, frequent, summed, n, SHAPE: tl.constexpr):
    """Sums [N / 3, D] of rows that occur more than twice, where a third of the head's position points. `gradients`: [N, D],
    `presum`'s. SHAPE: D, padded, gradients at once.
    """
    rows, positions = ordered
    given, sums = gradients
    heads, counted = frequent
    count = tl.load(counted)
    lane = tl.arange(0, SHAPE[2]).to(tl.int64)
    column = tl.arange(0, SHAPE[1])
    known = column < SHAPE[0]
    number = tl.program_id(0)
    while number < count:
        head = tl.load(heads + number).to(tl.int64)
        row = tl.load(rows + head)
        tile = head // _TILE + 1
        total = tl.full((SHAPE[2], SHAPE[1]), 0, tl.float64)
        at = head + lane
        mine = tl.load(rows + at, mask=(at < n) & (at < tile * _TILE), other=-1) == row
        while _any(mine):
            position = tl.load(positions + at, mask=mine, other=0).to(tl.int64)
            source = given + position[:, None] * SHAPE[0] + column[None, :]
            total += tl.load(source, mask=mine[:, None] & known[None, :], other=0)
            at += SHAPE[2]
            mine = mine & (tl.load(rows + at, mask=(at < n) & (at < tile * _TILE), other=-1) == row)
        at = tile + lane
        mine = tl.load(rows + at * _TILE, mask=at * _TILE < n, other=-1) == row
        while _any(mine):
            total += tl.load(
                sums + at[:, None] * SHAPE[0] + column[None, :], mask=mine[:, None] & known[None, :], other=0
            )
            at += SHAPE[2]
            mine = mine & (tl.load(rows + at * _TILE, mask=at * _TILE < n, other=-1) == row)
        total32 = tl.reduce(total, 0, tl.standard._sum_combine).to(tl.float32)
        tl.store(summed + head // 3 * SHAPE[0] + column, total32, mask=known)
        number += tl.num_programs(0)


@triton.jit
def _read(pointer, live):
    """Optimiser state, as float64."""
    return tl.load(pointer, mask=live, other=0).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _write(pointer, number, live):
    tl.store(pointer, number.to(tl.float32).to(tl.int32, bitcast=True), mask=live)


@triton.jit
def _kept(state, head, live, SHAPE: tl.constexpr):
    """State of a segment, in up to three parts."""
    each = state[:, None] + tl.arange(0, SHAPE[12])[None, :]
    if SHAPE[16]:
        word = tl.arange(0, 4)[None, :]
        whole = tl.load((state - SHAPE[13])[:, None] + word, mask=head[:, None], other=0)
        bits = tl.reduce(tl.where(word == SHAPE[13], whole, 0), 1, tl.standard._sum_combine)
        parts = (bits.to(tl.float32, bitcast=True).to(tl.float64), whole, head)
    elif SHAPE[14] == _ROWWISE_ADAGRAD:
        parts = (_read(state, head), head, head)
    elif SHAPE[14] == _ADAGRAD:
        parts = (_read(each, live), head, head)
    elif SHAPE[14] == _ADAM:
        parts = (_read(each, live), _read(each + SHAPE[11], live), _read(state + 2 * SHAPE[11], head))
    elif SHAPE[14] == _FTRL:
        parts = (_read(each, live), _read(each + SHAPE[11], live), head)
    else:
        parts = (head, head, head)
    return parts


@triton.jit
def _moved(values, kept, state, rates, masks, mark, SHAPE: tl.constexpr):
    """New values (float64) of a segment; its state goes to `state`. `values`: old, gradients (float32). `mark`: which rows
    are seen and changed, and the stamp."""
    head, live = masks
    old, g = values[0].to(tl.float64), values[1].to(tl.float64)
    rate, epsilon = tl.load(rates), tl.load(rates + 1)
    each = state[:, None] + tl.arange(0, SHAPE[12])[None, :]
    if SHAPE[14] == _ROWWISE_ADAGRAD:
        squares = kept[0] + tl.reduce(g * g, 1, tl.standard._sum_combine) * (1.0 / SHAPE[11])
        if SHAPE[16]:
            word = tl.arange(0, 4)[None, :]
            whole = tl.where(word == SHAPE[13], squares.to(tl.float32).to(tl.int32, bitcast=True)[:, None], kept[1])
            seen = tl.where(word == SHAPE[5], tl.maximum(whole, (mark[1] & 0xFFFFFFFF).to(tl.int32)), whole)
            seen = tl.where(word == SHAPE[5] + 1, (mark[1] >> 32).to(tl.int32), seen)
            whole = tl.where(mark[0][:, None], seen, whole)
            tl.store((state - SHAPE[13])[:, None] + word, whole, mask=head[:, None])
        else:
            _write(state, squares, head)
        old -= _over_root(rate, squares, epsilon)[:, None] * g
    elif SHAPE[14] == _ADAGRAD:
        squares = kept[0] + g * g
        _write(each, squares, live)
        old -= _over_root(rate, squares, epsilon) * g
    elif SHAPE[14] == _ADAM:
        beta1, beta2, steps = tl.load(rates + 2), tl.load(rates + 3), kept[2] + 1
        mean = beta1 * kept[0] + (1 - beta1) * g
        square = beta2 * kept[1] + (1 - beta2) * g * g
        _write(each, mean, live)
        _write(each + SHAPE[11], square, live)
        _write(state + 2 * SHAPE[11], steps, head)
        first = rate / (1 - tl.exp(steps * tl.load(rates + 4)))
        second = 1 / (1 - tl.exp(steps * tl.load(rates + 5)))
        old -= _over_root(mean * first[:, None], square * second[:, None], epsilon)
    elif SHAPE[14] == _FTRL:
        beta, l1, l2 = tl.load(rates + 2), tl.load(rates + 3), tl.load(rates + 4)
        squares = kept[1] + g * g
        z = kept[0] + g - (tl.sqrt(squares) - tl.sqrt(kept[1])) / rate * old
        _write(each, z, live)
        _write(each + SHAPE[11], squares, live)
        old = tl.where(tl.abs(z) <= l1, 0.0, (tl.where(z > 0, l1, -l1) - z) / ((beta + tl.sqrt(squares)) / rate + l2))
    else:
        old -= rate * g
    return old


@triton.jit
def _drawn(value, draws, KIND: tl.constexpr):
    """A float32 as it is stored: as one of the two nearest of its kind; the one farther from 0 if a draw (24 bits) is below
    the share of the way to it."""
    value = _clipped(value, KIND)
    bits = value.to(tl.uint32, bitcast=True)
    if KIND == _FLOAT16:
        low = bits & 0x1FFF
        near = (bits - low + tl.where((draws >> 11) < low, 0x2000, 0).to(tl.uint32)).to(tl.float32, bitcast=True)
        steps = tl.abs(value) * 16777216.0  # below 2^-14 halves are multiples of 2^-24
        whole = tl.floor(steps)
        whole += tl.where(draws.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < steps - whole, 1.0, 0.0)
        small = whole * tl.where(value < 0, -5.9604644775390625e-08, 5.9604644775390625e-08)
        stored = tl.where(steps < 1024, small, near).to(tl.float16)
    else:
        low = bits & 0xFFFF
        stored = ((bits - low + tl.where((draws >> 8) < low, 0x10000, 0).to(tl.uint32)) >> 16).to(tl.int16)
    return stored


@triton.jit
def _stored(value, row, position, order, record, head, SHAPE: tl.constexpr):
    """New values as they are stored. `order`: slots, keys, mixed seed. The row's steps are its last state."""
    slots, keys, seed = order
    count = record + (SHAPE[5] - 1)
    steps = _read(count, head)
    slot = tl.load(slots + position, mask=head, other=0)
    key = tl.load(keys + position, mask=head & (row >= SHAPE[7]), other=0)  # a default row has key 0
    hashed = _mix(_mix(slot.to(tl.uint64) + tl.load(seed).to(tl.uint64)) + key.to(tl.uint64))
    hashed += steps.to(tl.int64).to(tl.uint64) * 65536
    column = SHAPE[10] + tl.arange(0, SHAPE[12])[None, :]
    if SHAPE[15] == _COUNTED:
        _write(count, steps + 1, head)
    return _drawn(value, (_mix(hashed[:, None] + column.to(tl.uint64)) >> 40).to(tl.uint32), SHAPE[3])


@triton.jit(do_not_specialize=["stamp", "n"])
def step(ordered, gradients, columns, rates, stamp, n, SHAPE: tl.constexpr):
    """One optimiser step of one segment of each row, formulas as in `optimizers`; rows whose sum is not finite stay.

    `ordered` goes on, if values are rounded stochastically: slots, keys, mixed seed. `gradients`: [N, D], `combine`'s sums of
    rows that occur more than twice, refused. `rates`: rate, epsilon, and what else the optimiser has (float64). SHAPE goes
    on: start of the segment, its width, padded, start of its state, optimiser, rounding, and whether records, of row-wise
    Adagrad and four numbers, are read and written by one access. Rows are to be marked as seen and changed for one segment
    only.
    """
    rows, positions = ordered[0], ordered[1]
    given, summed, refused = gradients
    at = tl.program_id(0).to(tl.int64) * SHAPE[8] + tl.arange(0, SHAPE[8])
    row, head, more = _head(rows, at, n)
    frequent = more & (tl.load(rows + at + 2, mask=at + 2 < n, other=-1) == row)
    position = tl.load(positions + at, mask=head, other=0).to(tl.int64)
    second = tl.load(positions + at + 1, mask=more, other=0).to(tl.int64)
    column = SHAPE[10] + tl.arange(0, SHAPE[12])[None, :]
    known = column < SHAPE[10] + SHAPE[11]
    live = head[:, None] & known
    # All that a row needs is asked for before any of it is used.
    source = tl.where(frequent, summed + (at // 3) * SHAPE[1], given + position * SHAPE[1])
    g = tl.load(source[:, None] + column, mask=live, other=0)
    twice = (more & (frequent == 0))[:, None] & known
    g += tl.load(given + second[:, None] * SHAPE[1] + column, mask=twice, other=0)  # rounded once, as in float64
    place = tl.where(head, row, 0).to(tl.int64)
    target = _address(columns[0], place, SHAPE[0], SHAPE[1], SHAPE[3])[:, None] + column
    old = _decoded(tl.load(target, mask=live, other=0), SHAPE[3])
    record = _address(columns[1], place, SHAPE[0], SHAPE[4], _INT32)
    kept = _kept(record + SHAPE[13], head, live, SHAPE)
    infinite = tl.reduce(tl.where(tl.abs(g) <= _LARGEST, 0, 1), 1, tl.standard._elementwise_max) > 0
    tl.store(refused + row * 0, row * 0 + 1, mask=infinite)
    head = head & (infinite == 0)
    live = live & (infinite == 0)[:, None]
    mark = head & (row >= SHAPE[7])
    moved = _moved((old, g), kept, record + SHAPE[13], rates, (head, live), (mark, stamp), SHAPE).to(tl.float32)
    if SHAPE[15] == _NEAREST:
        tl.store(target, _nearest(moved, SHAPE[3]), mask=live)
    else:
        order = (ordered[2], ordered[3], ordered[4])
        tl.store(target, _stored(moved, row, position, order, record, head, SHAPE), mask=live)
    if SHAPE[9] and not SHAPE[16]:
        now = (stamp & 0xFFFFFFFF).to(tl.int32)
        seen = tl.load(record + SHAPE[5], mask=mark, other=0)
        tl.store(record + SHAPE[5], tl.maximum(seen, now), mask=mark)
        tl.store(record + SHAPE[5] + 1, (stamp >> 32).to(tl.int32) + row * 0, mask=mark)
