"""The slot list: which feature fields exist, in which order, and the hash that names them.

Legend: S shared columns (user, context), H columns of one history entry, I columns of one item, C cross columns,
N numbers. A column holds one key; a multi-valued field has several columns, padded by a mask.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from recsys.config import Config
from recsys.features.counter_layout import CounterLayout
from recsys.features.feature_kernels import ITEM, PAST, SHARED
from recsys.types import Int32


class Side(NamedTuple):
    """One side of a cross."""

    block: Literal["shared", "item", "history"]
    where: slice
    """Its columns there"""
    width: int
    """Columns in all, of `cross_history` entries if it is the history"""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What keys and numbers an example consists of."""

    slots: tuple[str, ...]
    """Slot names; the index is the slot number used in the table."""
    context: tuple[str, ...]
    item_fields: tuple[tuple[str, int], ...]
    """(slot name, width) of the item's deep fields; the item itself first, then the history attributes."""
    num_history_fields: int
    """The first of `item_fields` that describe a history entry, too."""
    crosses: tuple[tuple[str, str], ...]
    cross_history: int
    history_len: int
    sequences: tuple[tuple[str, ...], ...]
    """Feedback types of each sequence that the history is read as; empty types: all of them."""
    time_gaps: bool
    tasks: tuple[str, ...]
    counters: CounterLayout
    transition_context: tuple[str, ...]
    numbers: tuple[str, ...]
    declared: tuple[tuple[str, str], ...] = ()
    """(kind, name): `context` field, `event` of the history to count seconds from, and of the item a `number` or a `time` to count from;
    each is two of `numbers`, its value and whether it is missing"""
    buckets: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(attribute or context field, edges): its key is that of its bucket"""

    @classmethod
    def of(cls, config: Config) -> Schema:
        """The slot list that a configuration declares."""
        catalogue, features = config.catalogue, config.features
        width = {a: catalogue.max_values if a in catalogue.multivalued else 1 for a in catalogue.attributes}
        rest = tuple(a for a in catalogue.attributes if a not in features.history_attributes)
        item_fields = (("item", 1), *((a, width[a]) for a in (*features.history_attributes, *rest)))
        crosses = tuple(f"{left}*{right}" for left, right in features.crosses)
        tasks = tuple(task.name for task in config.tasks)
        in_context = [n for n in features.numbers if n in features.context and n not in catalogue.attributes]
        declared = (
            *(("context", name) for name in in_context),
            *(("event", name) for name in features.time_since if name == "last_event"),
            *(("number", name) for name in features.numbers if name not in in_context),
            *(("time", name) for name in features.time_since if name != "last_event"),
        )
        counters = CounterLayout.of(config)
        return cls(
            slots=("user", *(f"context.{c}" for c in features.context), *(name for name, _ in item_fields), *crosses),
            context=features.context,
            item_fields=item_fields,
            num_history_fields=1 + len(features.history_attributes),
            crosses=features.crosses,
            cross_history=features.cross_history,
            history_len=features.history_len,
            sequences=tuple(features.sequences.values()) or ((),),
            time_gaps=features.time_gaps,
            tasks=tasks,
            counters=counters,
            transition_context=features.transition_context,
            numbers=(
                *counters.names,
                "popularity",
                "covisit",
                "in_history",
                *(f"affinity.{a}" for a in features.history_attributes),
                *(f"{kind}.{name}{part}" for kind, name in declared for part in ("", ".missing")),
                *(transition_numbers(features.transition_context) if features.transitions else ()),
            ),
            declared=declared,
            buckets=tuple(features.buckets.items()),
        )

    @cached_property
    def hash(self) -> str:
        """Names the slot list in every impression and delta; another hash is another schema."""
        # Fields with a default came later: they count where they are set, so that hashes of before hold.
        values = zip(fields(self), astuple(self), strict=True)
        counted = tuple(value for field, value in values if value != field.default)
        return hashlib.blake2b(repr(counted).encode(), digest_size=8).hexdigest()

    @cached_property
    def edges(self) -> dict[str, tuple[float, ...]]:
        """Edges of the buckets of an attribute or context field."""
        return dict(self.buckets)

    @cached_property
    def first_declared(self) -> int:
        """Which of `numbers` is the first of `declared`."""
        return len(self.counters.numbers) + 2 + self.num_history_fields

    @cached_property
    def members(self) -> dict[str, list[int]]:
        """The sequences that a feedback type belongs to."""
        kinds = {kind for kinds in self.sequences for kind in kinds}
        return {kind: [s for s, kinds in enumerate(self.sequences) if kind in kinds] for kind in kinds}

    def slot(self, name: str) -> int:
        return self.slots.index(name)

    @cached_property
    def shared_slots(self) -> Int32:
        """Slot of each shared column [S]."""
        return np.array([0, *(self.slot(f"context.{c}") for c in self.context)], np.int32)

    @cached_property
    def item_slots(self) -> Int32:
        """Slot of each item column [I]."""
        return np.array([self.slot(name) for name, width in self.item_fields for _ in range(width)], np.int32)

    @cached_property
    def history_slots(self) -> Int32:
        """Slot of each column of a history entry [H]: the first H of `item_slots`."""
        return self.item_slots[: sum(width for _, width in self.item_fields[: self.num_history_fields])]

    @cached_property
    def item_columns(self) -> dict[str, slice]:
        """Where each item field's columns lie."""
        ends = np.cumsum([width for _, width in self.item_fields]).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(self.item_fields, ends, strict=True)}

    @cached_property
    def cross_slots(self) -> Int32:
        """Slot of each cross column [C]."""
        pairs = zip(self.crosses, self.cross_sides, strict=True)
        return np.array([self.slot(f"{x}*{y}") for (x, y), (a, b) in pairs for _ in range(a.width * b.width)], np.int32)

    @cached_property
    def cross_sides(self) -> tuple[tuple[Side, Side], ...]:
        """Where the two sides of each cross lie."""
        shared = {
            name: Side("shared", slice(column, column + 1), 1) for column, name in enumerate(("user", *self.context))
        }
        items = {name: Side("item", where, where.stop - where.start) for name, where in self.item_columns.items()}
        past = {
            "history" if name == "item" else f"history.{name}": Side("history", where, width * self.cross_history)
            for name, (_, where, width) in list(items.items())[: self.num_history_fields]
        }
        return tuple(((items | shared | past)[left], (shared | items)[right]) for left, right in self.crosses)

    @cached_property
    def cross_spec(self) -> Int32:
        """Where the sides of each cross lie [X, 2, 4]: see `feature_kernels.py`."""
        kinds = {"shared": SHARED, "item": ITEM, "history": PAST}
        sides = [
            [(kinds[side.block], side.where.start, side.where.stop - side.where.start, side.width) for side in pair]
            for pair in self.cross_sides
        ]
        return np.array(sides, np.int32).reshape(-1, 2, 4)

    @cached_property
    def deep_slots(self) -> tuple[int, ...]:
        """Slots whose rows hold an embedding and wide weights."""
        return tuple(range(len(self.slots) - len(self.crosses)))

    @cached_property
    def wide_slots(self) -> tuple[int, ...]:
        """Slots whose rows hold wide weights alone: the crosses."""
        return tuple(range(len(self.slots) - len(self.crosses), len(self.slots)))


def transition_numbers(context: tuple[str, ...]) -> tuple[str, ...]:
    """Of the last item: by each half-life, by context shared, by each slot that is shared; of the one before: the first
    of these; what the factor model says; what co-visits and popularity say together, as they are mixed."""
    weights = ("soon", "usual", "shared")
    slots = (*context, "before", "place")
    return tuple(f"follows.{w}" for w in (*weights, *slots, *(f"before.{w}" for w in weights), "factors", "mixed"))
