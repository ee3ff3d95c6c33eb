"""Rows of a table under another configuration: each keeps its values, optimiser state, last-seen and uses, under its slot's new number.

What a row did not have before is 0, with the optimiser state of a new row. Legend: N rows, D width of values, S width of state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.features.convert import places, slot_names
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.table.base import Layout, Pending, Rows, Segment
from recsys.table.rows import default_values, filter_places, initial_state, round_nearest
from recsys.table.segments import LayoutDelta, TablesDelta
from recsys.types import Float32, Int32

_NOWHERE = -1


class Moved(NamedTuple):
    """The tables as another configuration has them, and what became of rows by slot: kept and dropped; where counts began anew."""

    tables: dict[str, LayoutDelta]
    kept: dict[str, int]
    dropped: dict[str, int]
    begun: list[str]


def moved(tables: TablesDelta, old: Config, new: Config) -> Moved:
    """Every table that both configurations have."""
    before, after = ({each.name: each for each in layouts(c, Schema.of(c))} for c in (old, new))
    result = Moved({}, {}, {}, [])
    for name in [name for name in after if name in tables and name in before]:
        table = _Table(before[name], after[name], old, new)
        result.tables[name] = table.moved(tables[name])
        if name != "edge":
            _count(result, name, table, tables[name].rows.slots)
        if table.forgets(tables[name].pending):
            result.begun.append(name)
    return result


def _count(result: Moved, name: str, table: _Table, slots: Int32) -> None:
    for slot, text in table.names.items():
        rows = int((slots == slot).sum())
        which = result.kept if table.number[slot] != _NOWHERE else result.dropped
        if rows:
            which[f"{name}: {text}"] = rows


class _Table:
    """One table, from one layout to another."""

    def __init__(self, old: Layout, new: Layout, before: Config, after: Config) -> None:
        self._old, self._new = old, new
        self.names, names = _slots(old, before), _slots(new, after)
        numbers = {text: slot for slot, text in names.items()}
        self.number = np.full(1 + max(old.slots), _NOWHERE, np.int32)
        for slot, text in self.names.items():
            self.number[slot] = numbers.get(text, _NOWHERE)
        self._values = places(list(_values(old, before)), list(_values(new, after)))
        self._state = places(list(_states(old, before)), list(_states(new, after)))

    def moved(self, part: LayoutDelta) -> LayoutDelta:
        """Its rows, default rows and counts. There are no tombstones: the old table is left as it is."""
        return LayoutDelta(
            rows=self._rows(part.rows),
            removed_slots=np.zeros(0, np.int32),
            removed_keys=np.zeros(0, np.int64),
            defaults=self._defaults(part.defaults),
            pending=self._pending(part.pending),
        )

    def _rows(self, rows: Rows) -> Rows:
        rows = rows.take(self.number[rows.slots] != _NOWHERE)
        size = len(rows.keys)
        values = _laid_out(rows.values, self._values, np.zeros((size, self._new.dim), np.float32))
        state = _laid_out(rows.state, self._state, np.tile(initial_state(self._new), (size, 1)))
        values = round_nearest(values, self._new.precision)
        return replace(rows, slots=self.number[rows.slots], values=values, state=state)

    def _defaults(self, known: Rows) -> Rows:
        """Of every slot: as it was, or as of a table that is new."""
        rows = self._rows(known)
        slots = np.array(sorted(self._new.slots), np.int32)
        values, state = default_values(self._new), np.tile(initial_state(self._new), (len(slots), 1))
        at = np.searchsorted(slots, rows.slots)
        values[at], state[at] = rows.values, rows.state
        none = np.zeros(len(slots), np.int64)
        return Rows(slots=slots, keys=none, values=values, state=state, last_seen_ms=none.copy())

    def _pending(self, pending: Pending) -> Pending:
        """Counts of keys without a row; exact ones can be told to a filter, one filter's cannot be told to another."""
        kept = self.number[pending.slots] != _NOWHERE
        if max(policy.admission for policy in self._new.slots.values()) == 1:
            kept[:] = False
        slots, keys = self.number[pending.slots[kept]], pending.keys[kept]
        counts, last_seen_ms = pending.counts[kept], pending.last_seen_ms[kept]
        sketch, sketch_ms = np.zeros(-(-self._new.filter_counters // 4) * 4, np.uint8), 0
        if len(sketch) and self._same_filter():
            sketch, sketch_ms = pending.sketch, pending.sketch_ms
        elif len(sketch) and len(keys):
            at = filter_places(self._new, slots, keys)
            # Flat: where it has to broadcast small integers `ufunc.at` reads beyond them.
            np.maximum.at(sketch, at.ravel(), np.tile(np.minimum(counts, 255).astype(np.uint8), len(at)))
            sketch_ms = int(last_seen_ms.max())
        exact = slice(0 if len(sketch) else None)
        return replace(
            pending,
            slots=slots[exact],
            keys=keys[exact],
            counts=counts[exact],
            last_seen_ms=last_seen_ms[exact],
            sketch=sketch,
            sketch_ms=sketch_ms,
        )

    def _same_filter(self) -> bool:
        """Whether a key is counted where it was: a place is a hash of the slot's number, too."""
        old, new = self._old, self._new
        slots = all(self.number[slot] == slot for slot in old.slots)
        return slots and (old.filter_counters, old.seed) == (new.filter_counters, new.seed)

    def forgets(self, pending: Pending) -> bool:
        """Whether counts of keys without a row are lost."""
        return bool(pending.sketch.any()) and not self._same_filter()


def _laid_out(columns: Float32, at: npt.NDArray[np.intp], into: Float32) -> Float32:
    into[:, at >= 0] = columns[:, at[at >= 0]]
    return into


def _slots(layout: Layout, config: Config) -> dict[int, str]:
    """What each slot's rows are of. Of an edge it is its cluster's place."""
    if layout.name == "edge":
        return {slot: str(slot) for slot in layout.slots}
    names = slot_names(Schema.of(config))
    return {slot: names[slot] if slot < len(names) else "unused" for slot in layout.slots}


def _named(segment: Segment, config: Config) -> Iterator[tuple[str, Hashable]]:
    names = [task.name for task in config.tasks] if segment.name == "wide" else range(segment.dim)
    return ((segment.name, name) for name in names)


def _values(layout: Layout, config: Config) -> Iterator[Hashable]:
    return (name for segment in layout.segments for name in _named(segment, config))


def _states(layout: Layout, config: Config) -> Iterator[Hashable]:
    """A name for each column of the optimiser's state: see `rows.initial_state`."""
    for segment in layout.segments:
        each: Mapping[str, tuple[Any, ...]] = {
            "adagrad": ("square",),
            "adam": ("mean", "square"),
            "ftrl": ("z", "square"),
        }
        for kind in each.get(segment.optimizer, ()):
            yield from ((segment.optimizer, kind, name) for name in _named(segment, config))
        if segment.optimizer in ("rowwise_adagrad", "adam"):
            yield segment.optimizer, "row", segment.name
    if layout.rounding == "stochastic":
        yield "rounding"
