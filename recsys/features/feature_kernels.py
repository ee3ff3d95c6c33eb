"""The loops of the feature function, in Numba: no Python object, no GIL, one thread. Compiled at first use: see `warm_up`.

Legend: K items of a request, C counters (the first counts everything), H half-lives, W columns of a counter, P places of
the index (a power of two), V values that one item may have in one counter.

A counter's key is folded from its number and its slots' keys, so one index holds all counters. `spec` [C, 3, 3] says for
each counter and each of its up to three slots: 0 (none), 1 (shared column) or 2 (item columns); first column; columns. Crosses likewise, where a side
may also be 3 (columns of the history).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.types import Bool, Float32, Int32, Int64

MAX_SLOTS, MAX_VALUES = 3, 64
"""Slots of a counter; keys of one item in it, which bounds the room that a kernel needs."""
NONE, SHARED, ITEM, PAST = range(4)


class Columns(NamedTuple):
    """Keys and masks of one request: shared [S], item [K, I]."""

    shared_keys: Int64
    shared_mask: Bool
    item_keys: Int64
    item_mask: Bool


class Sums(NamedTuple):
    """places [P]: row + 1, 0 where empty; keys, owners, counters [rows]: key, user key and number of the counter; sums [rows, H, W]."""

    places: Int32
    keys: Int64
    owners: Int64
    counters: Int32
    sums: Float32


class Ratios(NamedTuple):
    """What `counted.CounterLayout` says of numbers, as arrays."""

    spec: Int32
    parents: Int32
    order: Int32
    parts: Int32
    priors: Any
    smoothing: float


@compiled
def mix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _side(columns: Any, past_keys: Any, past_mask: Any, side: Any, item: Any, number: Any) -> tuple[Any, Any]:
    """One side's key of an item, and whether it has a value."""
    kind, start, width = side[0], side[1], side[2]
    if kind == ITEM:
        return columns.item_keys[item, start + number], columns.item_mask[item, start + number]
    if kind == SHARED:
        return columns.shared_keys[start + number], columns.shared_mask[start + number]
    entry, column = number // width, start + number % width
    return past_keys[entry, column], past_mask[entry, column]


@compiled
def crosses(columns: Any, past_keys: Any, past_mask: Any, spec: Any, keys: Any, mask: Any) -> None:
    """Crossed keys and masks [K, C] of a request: past [T, H] are its newest history entries, spec [X, 2, 4] says for both sides of a
    cross its kind, first column, columns, and columns of all entries there may be. Keys and masks come as zeros."""
    for item in range(len(keys)):
        start = 0
        for cross in range(len(spec)):
            left, right = spec[cross, 0], spec[cross, 1]
            lefts = left[2] * len(past_keys) if left[0] == PAST else left[2]
            at = start
            for a in range(lefts):
                key, present = _side(columns, past_keys, past_mask, left, item, a)
                mixed = mix(np.uint64(key))
                for b in range(right[2]):
                    other, known = _side(columns, past_keys, past_mask, right, item, b)
                    if present and known:
                        keys[item, at] = np.int64(mix(mixed + np.uint64(other)))
                        mask[item, at] = True
                    at += 1
            start += left[3] * right[3]


@compiled
def _place_of(keys: Any, used: Any, key: Any) -> Any:
    """Where an open-addressed set (a power of two of places) has a key, or has room for it."""
    last = np.uint64(len(keys) - 1)
    place = mix(np.uint64(key)) & last
    while used[place] and keys[place] != key:
        place = (place + np.uint64(1)) & last
    return place


@compiled
def affinities(past: Any, weights: Any, items: Any, fields: Any, first: Any, numbers: Any) -> None:
    """What a history says of items, into `numbers` [K, …] from column `first` on: whether the item is in it, and for each field the share
    of the history, by its entries' weights [T], whose values the item has (the mean over its values).

    past: keys and mask [T, H] of entries; items: those of items [K, I]; fields [F, 2]: first column and the one after the last.
    """
    past_keys, past_mask = past
    item_keys, item_mask = items
    size = 64
    while size < 2 * past_keys.size:
        size *= 2
    keys, used, sums = np.zeros(size, np.int64), np.zeros(size, np.bool_), np.zeros(size)
    total = weights.sum()
    for field in range(-1, len(fields)):
        used[:] = False
        start, end = (0, 1) if field < 0 else (fields[field, 0], fields[field, 1])
        for entry in range(len(past_keys)):
            for column in range(start, end):
                if field < 0 or past_mask[entry, column]:  # an entry's own key is its id, whatever the mask says
                    place = _place_of(keys, used, past_keys[entry, column])
                    if not used[place]:
                        used[place], keys[place], sums[place] = True, past_keys[entry, column], 0.0
                    sums[place] += weights[entry]
        for item in range(len(item_keys)):
            share, count, found = 0.0, 0, False
            for column in range(start, end):
                if field < 0 or item_mask[item, column]:
                    count += 1
                    place = _place_of(keys, used, item_keys[item, column])
                    if used[place]:
                        share, found = share + sums[place], True
            value = np.float32(found) if field < 0 else np.float32(share / count / total) if found else np.float32(0)
            numbers[item, first + field + 1] = value


@compiled
def keys_of(columns: Any, spec: Any, counter: Any, item: Any, room: Any) -> int:
    """Write the keys of one item in one counter to room[0]; how many: 0 where a slot has no value."""
    now, num = 0, 1
    room[0, 0] = counter
    for slot in range(MAX_SLOTS):
        kind, start, width = spec[counter, slot, 0], spec[counter, slot, 1], spec[counter, slot, 2]
        if kind == NONE:
            break
        found = 0
        for before in range(num):
            folded = mix(np.uint64(room[now, before]))
            for column in range(start, start + width):
                if kind == SHARED:
                    present, key = columns.shared_mask[column], columns.shared_keys[column]
                else:
                    present, key = columns.item_mask[item, column], columns.item_keys[item, column]
                if present and found < MAX_VALUES:
                    room[1 - now, found] = np.int64(folded + np.uint64(key))
                    found += 1
        now, num = 1 - now, found
    if now == 1:
        for value in range(num):
            room[0, value] = room[1, value]
    return num


@compiled
def find(table: Any, key: Any) -> int:
    """The place of a key: the one that holds its row, or the empty one where it would be put."""
    last = np.uint64(len(table.places) - 1)
    place = mix(np.uint64(key)) & last
    while table.places[place] and table.keys[table.places[place] - 1] != key:
        place = (place + np.uint64(1)) & last
    return int(place)


@compiled
def index(table: Any, size: Any) -> None:
    """Put the first `size` rows into an empty index."""
    for row in range(size):
        table.places[find(table, table.keys[row])] = row + 1


@compiled
def add(table: Any, size: Any, columns: Any, spec: Any, amounts: Any, weights: Any) -> int:
    """Add amounts [W] times the weight of each half-life [H] for every item; rows in use after. The caller made room."""
    room = np.empty((2, MAX_VALUES), np.int64)
    for item in range(len(columns.item_keys)):
        for counter in range(len(spec)):
            for value in range(keys_of(columns, spec, counter, item, room)):
                place = find(table, room[0, value])
                if table.places[place] == 0:
                    table.places[place] = size + 1
                    table.keys[size] = room[0, value]
                    table.owners[size] = columns.shared_keys[0]
                    table.counters[size] = counter
                    table.sums[size] = 0.0
                    size += 1
                sums = table.sums[table.places[place] - 1]
                for h in range(len(weights)):
                    for w in range(len(amounts)):
                        sums[h, w] += np.float32(amounts[w] * weights[h])
    return size


@compiled
def read(table: Any, columns: Any, spec: Any, decays: Any, out: Any) -> None:
    """Decayed counts [K, C, H, W]; those of several values of a slot are added up."""
    room = np.empty((2, MAX_VALUES), np.int64)
    for counter in range(len(spec)):
        shared = True
        for slot in range(MAX_SLOTS):
            shared &= spec[counter, slot, 0] != ITEM
        for item in range(len(out)):
            if shared and item:
                out[item, counter] = out[0, counter]
                continue
            out[item, counter] = 0.0
            for value in range(keys_of(columns, spec, counter, item, room)):
                row = table.places[find(table, room[0, value])] - 1
                if row < 0:
                    continue
                for h in range(out.shape[2]):
                    for w in range(out.shape[3]):
                        out[item, counter, h, w] += table.sums[row, h, w] * decays[h]


@compiled
def numbers(counts: Any, layout: Any, out: Any) -> None:
    """Counts [K, C, H, W] to numbers [K, N]: log(1 + whole), or how much a rate differs from its parent's, in logits.

    A rate is (part + s parent's rate) / (whole + s).
    """
    num_counters, num_ratios = counts.shape[1], len(layout.priors)
    rates = np.empty((num_counters, counts.shape[2], num_ratios))
    parents = np.empty((num_counters, counts.shape[2], num_ratios))
    for item in range(len(counts)):
        for counter in layout.order:
            for h in range(counts.shape[2]):
                sums = counts[item, counter, h]
                for ratio in range(num_ratios):
                    parent = rates[layout.parents[counter], h, ratio] if counter else layout.priors[ratio]
                    part, whole = sums[layout.parts[ratio, 0]], sums[layout.parts[ratio, 1]]
                    rate = (part + layout.smoothing * parent) / (whole + layout.smoothing)
                    rates[counter, h, ratio] = min(max(rate, 1e-6), 1.0 - 1e-6)
                    parents[counter, h, ratio] = parent
        for number in range(len(layout.spec)):
            counter, h, ratio = layout.spec[number, 0], layout.spec[number, 1], layout.spec[number, 2]
            if ratio < 0:
                out[item, number] = np.log1p(counts[item, counter, h, layout.spec[number, 3]])
            else:
                rate, parent = rates[counter, h, ratio], parents[counter, h, ratio]
                out[item, number] = np.log(rate * (1.0 - parent) / (parent * (1.0 - rate)))
