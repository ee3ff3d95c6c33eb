"""Features that were written with another slot list, as this one has them: by the names of slots and numbers.

What the other list does not have is missing: no key, no entry, a number of 0 that is said to be missing. Legend: see `schema.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recsys.errors import BadInput
from recsys.features.build import Features, Index, UserFeatures, decode, encode
from recsys.features.counter_layout import CounterLayout
from recsys.features.schema import Schema
from recsys.types import Impression, UInt8

MISSING = ".missing"
"""End of the name of the number that says whether another one is missing."""


def slot_names(schema: Schema) -> tuple[str, ...]:
    """What names each slot's rows: beside its name the edges of its buckets, without which its keys mean nothing."""
    own = {name: f"{name} in {list(edges)}" for name, edges in schema.edges.items()}
    fields = {f"context.{name}": f"context.{text}" for name, text in own.items() if name in schema.context} | own
    sides = {name: own.get(name, name) for cross in schema.crosses for name in cross}
    sides |= {f"history.{name}": f"history.{text}" for name, text in own.items()}
    crosses = {f"{left}*{right}": f"{sides[left]}*{sides[right]}" for left, right in schema.crosses}
    return tuple(crosses.get(name, fields.get(name, name)) for name in schema.slots)


class Counted(NamedTuple):
    """What one number of a counter counts."""

    kind: str
    slots: tuple[str, ...]
    half_life_s: float
    column: str


def counted(layout: CounterLayout) -> dict[str, Counted]:
    """The numbers of counters by name."""
    found = {}
    for name, counter, h, *_ in layout.numbers:
        slots, half_life_s = layout.slots[counter], layout.half_lives_s[h]
        kind, _, rest = name.partition(".")
        found[name] = Counted(kind, slots, half_life_s, rest.removeprefix(f"{'*'.join(slots)}.{half_life_s:g}."))
    return found


def renamed_numbers(old: Schema, new: Schema) -> dict[str, str]:
    """Numbers of `old` that go on under another name in `new`: a counter's half-life was set anew, and its counts are kept."""
    was, becomes = counted(old.counters), counted(new.counters)
    names, other = {one: name for name, one in becomes.items()}, dict[tuple[tuple[str, ...], float], float]()
    for slots in {one.slots for one in was.values()}:
        before, after = (sorted({one.half_life_s for one in x.values() if one.slots == slots}) for x in (was, becomes))
        gone, come = [h for h in before if h not in after], [h for h in after if h not in before]
        other |= {(slots, one): another for one, another in zip(gone, come, strict=False)}
    renamed = {}
    for name, one in was.items():
        half_life_s = other.get((one.slots, one.half_life_s))
        if half_life_s is not None and (found := names.get(one._replace(half_life_s=half_life_s))) is not None:
            renamed[name] = found
    return renamed


def places(old: Sequence[Hashable], new: Sequence[Hashable]) -> Index:
    """Where each of `new` is in `old`, -1: nowhere."""
    known = {name: place for place, name in enumerate(old)}
    return np.array([known.get(name, -1) for name in new], np.intp)


def picked(columns: npt.NDArray[Any], at: Index) -> npt.NDArray[Any]:
    """Columns [..., C] at these places [C']; zeros where there is none."""
    padded = np.concatenate([columns, np.zeros((*columns.shape[:-1], 1), columns.dtype)], -1)
    return np.ascontiguousarray(padded[..., at])


class Conversion:
    """From one slot list to another. Pure, so that a replay converts the same."""

    def __init__(self, old: Schema, new: Schema) -> None:
        self.old, self.new = old, new
        columns = zip(_columns(old), _columns(new), strict=True)
        self.shared, self.history, self.item, self._crosses = (places(*pair) for pair in columns)
        renamed = renamed_numbers(old, new)
        self._numbers = places([renamed.get(name, name) for name in old.numbers], new.numbers)
        said = [name.endswith(MISSING) and at < 0 for name, at in zip(new.numbers, self._numbers, strict=True)]
        self._said_missing = np.array(said, np.bool_)
        self._sequences = _sequences(old, new)

    def encoded(self, data: bytes) -> bytes:
        """What `encode` made with the old list, as if with the new one. BadInput as `decode`."""
        return encode(self.features(decode(self.old, data)))

    def features(self, features: Features) -> Features:
        """One request's keys and numbers."""
        numbers = picked(features.numbers, self._numbers)
        numbers[:, self._said_missing] = 1.0
        return Features(
            user=self._user(features.user),
            item_keys=picked(features.item_keys, self.item),
            item_mask=picked(features.item_mask, self.item),
            cross_keys=picked(features.cross_keys, self._crosses),
            cross_mask=picked(features.cross_mask, self._crosses),
            numbers=numbers,
        )

    def _user(self, user: UserFeatures) -> UserFeatures:
        kinds = self._kinds(user.history_kinds)
        kept = kinds > 0
        gaps = user.history_gaps if self.old.time_gaps and self.new.time_gaps else np.zeros_like(user.history_gaps)
        return replace(
            user,
            shared_keys=picked(user.shared_keys, self.shared),
            shared_mask=picked(user.shared_mask, self.shared),
            history_keys=picked(user.history_keys, self.history)[kept],
            history_mask=picked(user.history_mask, self.history)[kept],
            history_kinds=kinds[kept],
            history_gaps=gaps[kept],
        )

    def _kinds(self, kinds: UInt8) -> UInt8:
        """Each entry's sequences [T], of each of which the newest are kept."""
        found = np.zeros_like(kinds)
        for place, sources in enumerate(self._sequences):
            own = np.zeros(len(kinds), np.bool_)
            for source in sources:
                own |= (kinds >> np.uint8(source) & 1).astype(np.bool_)
            own &= own.cumsum() <= self.new.history_len
            found |= own.astype(np.uint8) << np.uint8(place)
        return found


def _sequences(old: Schema, new: Schema) -> list[list[int]]:
    """Which sequences of `old` each of `new` is made of: that of the same types, or all if it is one of all."""
    every = list(range(len(old.sequences)))
    return [every if kinds == () else [s for s in every if old.sequences[s] == kinds] for kinds in new.sequences]


def _columns(schema: Schema) -> tuple[list[Hashable], ...]:
    """A name for each column: shared, history, item, crosses."""
    names = dict(zip(schema.slots, slot_names(schema), strict=True))
    item: list[Hashable] = [(names[name], n) for name, width in schema.item_fields for n in range(width)]
    crosses: list[Hashable] = []
    for (x, y), (left, right) in zip(schema.crosses, schema.cross_sides, strict=True):
        name, each = names[f"{x}*{y}"], left.where.stop - left.where.start
        crosses += [(name, *divmod(a, each), b) for a in range(left.width) for b in range(right.width)]
    shared: list[Hashable] = [names["user"], *(names[f"context.{c}"] for c in schema.context)]
    return shared, item[: len(schema.history_slots)], item, crosses


class Conversions:
    """From each of several earlier slot lists, by its hash."""

    def __init__(self, earlier: Mapping[str, Schema], new: Schema) -> None:
        self._earlier, self._new = dict(earlier), new
        self._made: dict[str, Conversion] = {}

    def impression(self, impression: Impression) -> Impression:
        """One that was written with an earlier list, as if with the new one; BadInput where the list is not known."""
        hashed, own = impression.schema, self._new.hash
        if hashed not in self._earlier:
            raise BadInput(
                f"schema {hashed!r} is unknown, this trainer has {own!r}: restart ranking and trainer with one configuration",
                field="schema",
            )
        if hashed not in self._made:
            self._made[hashed] = Conversion(self._earlier[hashed], self._new)
        return replace(impression, schema=own, features=self._made[hashed].encoded(impression.features))
