"""The loops of co-visits, in Numba: an event is counted, a request's history is read. See `covisit_pool` for where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.retrieval.covisit_pool import (
    END,
    PAIRS,
    SLOTS,
    Pairs,
    Rules,
    drop,
    grow,
    largest_of,
    link,
    new,
    prune,
    room_of,
    scale_item,
    unlink,
)
from recsys.retrieval.select import best_first, may_show, place_of, room_for

_MAX_EXPONENT = 400
"""Half-lives of an item's own clock after which its sums are rescaled; with the time's 512 it stays below float64's 1,023."""


class Reading(NamedTuple):
    """What a count of an item's newest is worth to those before it, and what a sum is worth now."""

    discount: float
    half_life_visits: float
    decay: float


@compiled
def _count(pairs: Any, rules: Any, source: Any, target: Any, amount: Any, weight: Any, alive: Any) -> None:
    number = pairs.slot_of[source]
    if number:
        unlink(pairs.slots, number)
        link(pairs.slots, number)
    else:
        number = new(pairs, source, 0, rules.most)
    slot = pairs.slots[number]
    slot.clock += amount
    exponent = slot.clock / rules.half_life_visits
    if exponent > _MAX_EXPONENT:
        slot.clock -= _MAX_EXPONENT * rules.half_life_visits
        exponent -= _MAX_EXPONENT
        scale_item(pairs, slot, 2.0**-_MAX_EXPONENT)
    added = weight * (amount * np.exp2(exponent))
    for entry in range(slot.start, slot.start + slot.size):
        if pairs.targets[entry] == target:
            pairs.sums[entry] += added
            return
    if slot.size == room_of(slot.kind, rules.most):
        grow(pairs, slot, rules.most)
    end = slot.start + slot.size
    pairs.targets[end], pairs.sums[end] = target, added
    slot.size += 1
    pairs.head[PAIRS] += 1
    if slot.size == rules.most:
        keep = rules.most // 2
        slot.lost += prune(pairs.targets[slot.start : end + 1], pairs.sums[slot.start : end + 1], keep, alive)
        pairs.head[PAIRS] -= slot.size - keep
        slot.size = keep


@compiled
def add(arrays: Any, numbers: Any, row: Any, before: Any, weight: Any, alive: Any) -> bool:
    """Count a row as following the rows before it (below 0: not known), and let the items go that were least recently counted, where
    that is too much. False: there is no room, and nothing was done. `Pairs` and `Rules` come as plain tuples: a microsecond less."""
    pairs, rules = Pairs(*arrays), Rules(*numbers)
    counts = 2 * len(rules.discounts)
    if pairs.head[SLOTS] + counts > len(pairs.slots) or pairs.head[END] + counts * rules.most > len(pairs.targets):
        return False
    top = row
    for earlier in before:
        top = max(top, earlier)
    if top >= len(pairs.slot_of):
        return False
    for place in range(min(len(before), len(rules.discounts))):
        earlier, amount = before[place], rules.discounts[place]
        if earlier != row and earlier >= 0:
            _count(pairs, rules, earlier, row, amount, weight, alive)
            if rules.backward:
                _count(pairs, rules, row, earlier, amount * rules.backward, weight, alive)
    while pairs.head[PAIRS] > rules.max_pairs:
        oldest = pairs.slots[0].newer
        slot = pairs.slots[oldest]
        most = slot.lost + largest_of(pairs.sums, slot.start, slot.start + slot.size)
        pairs.slots[0].lost = max(pairs.slots[0].lost, most * np.exp2(-slot.clock / rules.half_life_visits))
        drop(pairs, oldest)
    return True


@compiled
def _slot_of(pairs: Any, row: Any) -> Any:
    """The slot of a row's item; 0 where it has none."""
    return pairs.slot_of[row] if 0 <= row < len(pairs.slot_of) else np.int32(0)


@compiled
def candidates(pairs: Any, reading: Any, history: Any, k: Any, allowed: Any, filtered: Any) -> Any:
    """The k best neighbours (allowed, where filtered) of the history's items, newest first, and each one's Σ discount^place × count."""
    count = 0
    for row in history:
        count += pairs.slots[_slot_of(pairs, row)].size
    rows, totals, places = np.empty(count, np.int32), np.empty(count), room_for(count)
    count, share = 0, 1.0
    for row in history:
        slot = pairs.slots[_slot_of(pairs, row)]
        worth = share * np.exp2(-slot.clock / reading.half_life_visits)
        for entry in range(slot.start, slot.start + slot.size):
            target = pairs.targets[entry]
            at = place_of(target, places, rows)
            if places[at]:
                totals[places[at] - 1] += worth * pairs.sums[entry]
            elif share > 0.0 and (not filtered or may_show(target, allowed, rows[:0])):
                rows[count], totals[count] = target, worth * pairs.sums[entry]
                count += 1
                places[at] = count
        share *= reading.discount
    count = best_first(rows[:count], totals[:count], k)
    return rows[:count], (totals[:count] * reading.decay).astype(np.float32)


@compiled
def score(pairs: Any, reading: Any, history: Any, wanted: Any) -> Any:
    """Σ discount^place × count over the history's items, newest first, for each wanted row; 0 where they never met."""
    totals, places, first = np.zeros(len(wanted)), room_for(len(wanted)), np.empty(len(wanted), np.int32)
    for entry in range(len(wanted)):
        at = place_of(wanted[entry], places, wanted)
        if places[at] == 0:
            places[at] = entry + 1
        first[entry] = places[at] - 1
    share = 1.0
    for row in history:
        slot = pairs.slots[_slot_of(pairs, row)]
        worth = share * np.exp2(-slot.clock / reading.half_life_visits)
        for entry in range(slot.start, slot.start + slot.size):
            found = places[place_of(pairs.targets[entry], places, wanted)]
            if found:
                totals[found - 1] += worth * pairs.sums[entry]
        share *= reading.discount
    out = np.empty(len(wanted), np.float32)
    for entry in range(len(wanted)):
        out[entry] = totals[first[entry]] * reading.decay
    return out
