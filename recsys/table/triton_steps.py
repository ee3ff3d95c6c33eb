"""Training the CUDA table's rows, in Triton: sum what is of one row, then one step of its optimisers.

Legend and SHAPE as in `triton_kernels`. `ordered`: rows in order [N], and the position of each in the batch: so equal rows
are neighbours, in order of occurrence. No sum depends on a race.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from recsys.table.triton_kernels import INT32, _address, _any

SGD, ADAGRAD, ROWWISE_ADAGRAD = 0, 1, 2
TILE = 256
"""Gradients of one row that one lane sums; what goes beyond is summed by tiles, all at once. Half halves the wait for the
most frequent key's tile and doubles that for its number of tiles: for a million Zipf keys both take about as long."""
_TILE = tl.constexpr(TILE)
_INT32 = tl.constexpr(INT32)
_ADAGRAD, _ROWWISE_ADAGRAD = tl.constexpr(ADAGRAD), tl.constexpr(ROWWISE_ADAGRAD)
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


@triton.jit(do_not_specialize=["stamp", "n"])
def step(ordered, gradients, columns, rates, stamp, n, SHAPE: tl.constexpr):
    """One optimiser step of one segment of each row, formulas as in `optimizers`; rows whose sum is not finite stay.

    `gradients`: [N, D], `combine`'s sums of rows that occur more than twice, refused. `rates`: rate, epsilon (float64). SHAPE
    goes on: start of the segment, its width, padded, start of its state, optimiser. Rows are to be marked as seen and changed for one segment only.
    """
    rows, positions = ordered
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
    g32 = tl.load(source[:, None] + column, mask=live, other=0)
    twice = (more & (frequent == 0))[:, None] & known
    g32 += tl.load(given + second[:, None] * SHAPE[1] + column, mask=twice, other=0)  # rounded once, as in float64
    place = tl.where(head, row, 0).to(tl.int64)
    target = _address(columns[0], place, SHAPE[0], SHAPE[1], SHAPE[3])[:, None] + column
    old = tl.load(target, mask=live, other=0)
    record = _address(columns[1], place, SHAPE[0], SHAPE[4], _INT32)
    state = record + SHAPE[13]
    if SHAPE[14] == _ADAGRAD:
        state = state[:, None] + (column - SHAPE[10])
        squares = tl.load(state, mask=live, other=0).to(tl.float32, bitcast=True).to(tl.float64)
    if SHAPE[14] == _ROWWISE_ADAGRAD:
        squares = tl.load(state, mask=head, other=0).to(tl.float32, bitcast=True).to(tl.float64)
    infinite = tl.reduce(tl.where(tl.abs(g32) <= _LARGEST, 0, 1), 1, tl.standard._elementwise_max) > 0
    tl.store(refused + row * 0, row * 0 + 1, mask=infinite)
    head = head & (infinite == 0)
    live = live & (infinite == 0)[:, None]
    g = g32.to(tl.float64)
    rate = tl.load(rates)
    if SHAPE[14] == _ROWWISE_ADAGRAD:
        squares += tl.reduce(g * g, 1, tl.standard._sum_combine) * (1.0 / SHAPE[11])
        tl.store(state, squares.to(tl.float32).to(tl.int32, bitcast=True), mask=head)
        rate = _over_root(rate, squares, tl.load(rates + 1))[:, None]
    if SHAPE[14] == _ADAGRAD:
        squares += g * g
        tl.store(state, squares.to(tl.float32).to(tl.int32, bitcast=True), mask=live)
        rate = _over_root(rate, squares, tl.load(rates + 1))
    tl.store(target, (old.to(tl.float64) - rate * g).to(tl.float32), mask=live)
    if SHAPE[9]:
        mark = head & (row >= SHAPE[7])
        now = (stamp & 0xFFFFFFFF).to(tl.int32)
        seen = tl.load(record + SHAPE[5], mask=mark, other=0)
        tl.store(record + SHAPE[5], tl.maximum(seen, now), mask=mark)
        tl.store(record + SHAPE[5] + 1, (stamp >> 32).to(tl.int32) + row * 0, mask=mark)
