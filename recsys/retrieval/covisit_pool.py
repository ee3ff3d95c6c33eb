"""Where co-visits lie: the pairs of all items in flat arrays, least recently counted item first, and the loops that move them.

An item has a slot, and a slot has a block of the pool, in which its pairs lie. Blocks have a few sizes: 4, 8, 16 … and `most`,
which a block never fills. A free block holds the start of the next of its size, and a free slot the next one, from 1; 0 ends a chain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recsys.compiled import compiled
from recsys.types import Int32, Int64

SLOT = np.dtype(
    [(name, np.float64) for name in ("clock", "lost")]
    + [(name, np.int32) for name in ("row", "start", "kind", "size", "older", "newer")]
)
"""An item: the clock that counts what was added; what was lost, in units of its sums; its block, and how many pairs are in it. Slot 0
is none: it closes the ring of items by age, and `lost` is there the most that a pair of an item that went may have counted."""
PAIRS, SLOTS, END, FREE_SLOT, FREE_BLOCKS = range(5)
"""Places in `head`: pairs kept; slots and entries of the pool ever used; first free slot; first free block of each size."""
_SMALLEST = 4
"""Pairs in the smallest block: half wastes slots on growing, double wastes room where most items are rare."""


class Pairs(NamedTuple):
    """slot_of [rows]: slot of each row's item; slots [S]; the pool: targets [P], sums [P]; head: see above."""

    slot_of: Int32
    slots: npt.NDArray[np.void]
    targets: Int32
    sums: npt.NDArray[np.float64]
    head: Int64


class Rules(NamedTuple):
    """What `CoVisits` was made with; of `most` pairs of an item half are kept."""

    discounts: npt.NDArray[np.float64]
    backward: float
    half_life_visits: float
    most: int
    max_pairs: int


@compiled
def _copy(targets: Any, sums: Any, start: Any, size: Any, to_targets: Any, to_sums: Any, to: Any) -> None:
    for entry in range(size):
        to_targets[to + entry], to_sums[to + entry] = targets[start + entry], sums[start + entry]


@compiled
def largest_of(sums: Any, start: Any, end: Any) -> float:
    """The largest of some sums; there is one."""
    most = sums[start]
    for entry in range(start + 1, end):
        most = max(most, sums[entry])
    return float(most)


@compiled
def room_of(kind: Any, most: Any) -> Any:
    """How many pairs a block of a kind holds."""
    return min(_SMALLEST << kind, most)


@compiled
def _kind_for(size: Any, most: Any) -> Any:
    kind = 0
    while room_of(kind, most) < size:
        kind += 1
    return kind


@compiled
def _take(pairs: Any, kind: Any, most: Any) -> Any:
    """The start of a block."""
    free = pairs.head[FREE_BLOCKS + kind]
    if free:
        pairs.head[FREE_BLOCKS + kind] = pairs.targets[free - 1]
        return np.int64(free - 1)
    start = pairs.head[END]
    pairs.head[END] += room_of(kind, most)
    return np.int64(start)


@compiled
def _give(pairs: Any, start: Any, kind: Any) -> None:
    """A block that is free again."""
    pairs.targets[start] = pairs.head[FREE_BLOCKS + kind]
    pairs.head[FREE_BLOCKS + kind] = start + 1


@compiled
def unlink(slots: Any, number: Any) -> None:
    slot = slots[number]
    slots[slot.older].newer = slot.newer
    slots[slot.newer].older = slot.older


@compiled
def link(slots: Any, number: Any) -> None:
    """The newest."""
    slots[number].older, slots[number].newer = slots[0].older, 0
    slots[slots[0].older].newer = number
    slots[0].older = number


@compiled
def new(pairs: Any, row: Any, kind: Any, most: Any) -> Any:
    """A slot for an item that has none."""
    number = pairs.head[FREE_SLOT]
    if number:
        pairs.head[FREE_SLOT] = pairs.slots[number].newer
    else:
        number = pairs.head[SLOTS]
        pairs.head[SLOTS] += 1
    slot = pairs.slots[number]
    slot.row, slot.start, slot.kind, slot.size = row, _take(pairs, kind, most), kind, 0
    slot.clock, slot.lost = 0.0, pairs.slots[0].lost
    pairs.slot_of[row] = number
    link(pairs.slots, number)
    return number


@compiled
def drop(pairs: Any, number: Any) -> None:
    """The item at a slot is not kept any more."""
    slot = pairs.slots[number]
    unlink(pairs.slots, number)
    _give(pairs, slot.start, slot.kind)
    pairs.head[PAIRS] -= slot.size
    pairs.slot_of[slot.row] = 0
    slot.size, slot.row, slot.newer = 0, -1, pairs.head[FREE_SLOT]
    pairs.head[FREE_SLOT] = number


@compiled
def scale_item(pairs: Any, slot: Any, factor: Any) -> None:
    """Multiply; what became 0 is gone."""
    kept = slot.start
    for entry in range(slot.start, slot.start + slot.size):
        total = pairs.sums[entry] * factor
        if total > 0.0:
            pairs.targets[kept], pairs.sums[kept] = pairs.targets[entry], total
            kept += 1
    pairs.head[PAIRS] -= slot.start + slot.size - kept
    slot.size = kept - slot.start
    slot.lost *= factor


@compiled
def scale(pairs: Any, factor: Any) -> None:
    """Multiply everything; items of which nothing stays are gone."""
    pairs.slots[0].lost *= factor
    for number in range(1, pairs.head[SLOTS]):
        slot = pairs.slots[number]
        if slot.size:
            scale_item(pairs, slot, factor)
            if slot.size == 0:
                drop(pairs, number)


@compiled
def _is_alive(row: Any, alive: Any) -> bool:
    return bool(row >= len(alive) or alive[row])


@compiled
def _goes_before(targets: Any, sums: Any, one: Any, other: Any, alive: Any) -> bool:
    """Whether a pair is the better one to keep: alive, larger, lower row."""
    lives, others = _is_alive(targets[one], alive), _is_alive(targets[other], alive)
    if lives != others:
        return lives
    return bool(sums[one] > sums[other] or (sums[one] == sums[other] and targets[one] < targets[other]))


@compiled
def prune(targets: Any, sums: Any, keep: Any, alive: Any) -> float:
    """Put the best first (a Shell sort); the largest sum beyond the first `keep`."""
    gap = len(sums) // 2
    while gap:
        for entry in range(gap, len(sums)):
            at = entry
            while at >= gap and _goes_before(targets, sums, at, at - gap, alive):
                targets[at], targets[at - gap] = targets[at - gap], targets[at]
                sums[at], sums[at - gap] = sums[at - gap], sums[at]
                at -= gap
        gap //= 2
    return largest_of(sums, keep, len(sums))


@compiled
def grow(pairs: Any, slot: Any, most: Any) -> None:
    """Move an item whose block is full into a larger one."""
    start, size = slot.start, slot.size
    to = _take(pairs, slot.kind + 1, most)
    _copy(pairs.targets, pairs.sums, start, size, pairs.targets, pairs.sums, to)
    _give(pairs, start, slot.kind)
    slot.start = to
    slot.kind += 1


@compiled
def tight(pairs: Any, most: Any) -> Any:
    """Entries of the pool, if each item had the smallest block that it does not fill."""
    count = 0
    for number in range(1, pairs.head[SLOTS]):
        if pairs.slots[number].size:
            count += room_of(_kind_for(pairs.slots[number].size + 1, most), most)
    return count


@compiled
def repack(pairs: Any, targets: Any, sums: Any, most: Any) -> None:
    """Move every item into such a block of a new pool, the least recently counted first; no block is free then."""
    pairs.head[END] = 0
    for kind in range(FREE_BLOCKS, len(pairs.head)):
        pairs.head[kind] = 0
    number = pairs.slots[0].newer
    while number:
        slot = pairs.slots[number]
        slot.kind = _kind_for(slot.size + 1, most)
        _copy(pairs.targets, pairs.sums, slot.start, slot.size, targets, sums, pairs.head[END])
        slot.start = pairs.head[END]
        pairs.head[END] += room_of(slot.kind, most)
        number = slot.newer


@compiled
def forget(pairs: Any, gone: Any, first: Any, last: Any) -> None:
    """Of the slots from `first` to before `last`: drop items and pairs whose rows are gone [rows]; rows beyond its end are not."""
    for number in range(first, min(last, pairs.head[SLOTS])):
        slot = pairs.slots[number]
        if slot.size == 0:
            continue
        kept = slot.start
        if slot.row >= len(gone) or not gone[slot.row]:
            for entry in range(slot.start, slot.start + slot.size):
                target = pairs.targets[entry]
                if target >= len(gone) or not gone[target]:
                    pairs.targets[kept], pairs.sums[kept] = target, pairs.sums[entry]
                    kept += 1
        pairs.head[PAIRS] -= slot.start + slot.size - kept
        slot.size = kept - slot.start
        if slot.size == 0:
            drop(pairs, number)


@compiled
def saved(pairs: Any) -> Any:
    """Item by item, the least recently counted first: sources, clocks, what was lost, sizes, targets, sums."""
    items, number = 0, pairs.slots[0].newer
    while number:
        items, number = items + 1, pairs.slots[number].newer
    count = pairs.head[PAIRS]
    sources, sizes, targets = np.empty(items, np.int32), np.empty(items, np.int64), np.empty(count, np.int32)
    clocks, lost, sums = np.empty(items), np.empty(items + 1), np.empty(count)
    lost[0] = pairs.slots[0].lost
    item, at, number = 0, 0, pairs.slots[0].newer
    while number:
        slot = pairs.slots[number]
        start, size = slot.start, slot.size
        sources[item], sizes[item], clocks[item], lost[item + 1] = slot.row, size, slot.clock, slot.lost
        _copy(pairs.targets, pairs.sums, start, size, targets, sums, at)
        item, at, number = item + 1, at + size, slot.newer
    return sources, clocks, lost, sizes, targets, sums


@compiled
def load(pairs: Any, most: Any, sizes: Any, columns: Any, alive: Any) -> None:
    """Put what was `saved` into empty pairs, which have room."""
    sources, clocks, lost, targets, sums = columns
    start = 0
    for item in range(len(sizes)):
        size, end, more = sizes[item], start + sizes[item], 0.0
        if size >= most:  # it was saved with more neighbours
            more, size = prune(targets[start:end], sums[start:end], most // 2, alive), most // 2
        number = new(pairs, sources[item], _kind_for(size + 1, most), most)
        slot = pairs.slots[number]
        slot.clock, slot.lost, slot.size = clocks[item], lost[item] + more, size
        _copy(targets, sums, start, size, pairs.targets, pairs.sums, slot.start)
        pairs.head[PAIRS] += size
        start = end
