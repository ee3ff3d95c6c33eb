"""Streaming counters: decayed impressions, positives per task and events of any declared combination of slots.

What a counter says is what it counted before: ranking and replay read it when a request is answered, and the trainer
learns from what was read. Legend: see `feature_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay, counted
from recsys.features import feature_kernels
from recsys.features.feature_kernels import ITEM, MAX_SLOTS, SHARED, Columns, Ratios, Sums
from recsys.features.schema import Schema
from recsys.types import Bool, Float32, Int32, Int64

_MAX_EXPONENT = 64
"""Half-lives after which sums are rescaled: float32 holds 127 of them, and sums up to 2^60 beside."""
_ROOM = 4096
"""Rows of a new table; it doubles as it fills, up to its capacity."""

_KEPT: tuple[Literal["C", "A", "W"], ...] = ("C", "A", "W")


class Counters:
    """Sums with exponential forgetting, by (counter, keys of its slots). One writer; its owner's lock holds readers off.

    A sum is the exact decayed sum in any order of events. When `capacity` rows are in use, the half with the least left
    of its longest half-life is dropped.
    """

    def __init__(self, schema: Schema, capacity: int = 1_000_000) -> None:
        layout = schema.counters
        self._spec, self._of_users = spec_of(schema), layout.of_users
        self._columns = {name: column for column, name in enumerate(layout.columns)}
        self._ratios = Ratios(
            layout.spec, layout.parents, layout.order, layout.parts, layout.priors, float(layout.smoothing)
        )
        self._decays = [ForwardDecay(s, _MAX_EXPONENT) for s in layout.half_lives_s]
        self._keys_of_an_item = int(self._spec[:, :, 2].clip(1).prod(1).sum())
        self._capacity = max(capacity, _ROOM)
        self._size, self._table = 0, self._empty(_ROOM)
        self._warm_up(schema)

    def _warm_up(self, schema: Schema) -> None:
        """Compile every kernel, or read it from the on-disk cache: no request waits for it."""
        shared, items = len(schema.shared_slots), len(schema.item_slots)
        no_keys, no_mask = np.zeros((0, items), np.int64), np.zeros((0, items), np.bool_)
        nothing = columns_of(np.zeros(shared, np.int64), np.zeros(shared, np.bool_), no_keys, no_mask)
        feature_kernels.add(
            self._table, 0, nothing, self._spec, np.zeros(len(self._columns)), np.zeros(len(self._decays))
        )
        feature_kernels.index(self._table, 0)
        self.numbers(self.counts(nothing, 0))

    def __len__(self) -> int:
        return self._size

    def _empty(self, rows: int) -> Sums:
        return Sums(
            places=np.zeros(2 * rows, np.int32),
            keys=np.zeros(rows, np.int64),
            owners=np.zeros(rows, np.int64),
            counters=np.zeros(rows, np.int32),
            sums=np.zeros((rows, len(self._decays), len(self._columns)), np.float32),
        )

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._size / self._capacity

    def add(self, columns: Columns, values: Sequence[str], now_ms: int, amount: float = 1.0) -> None:
        """Count these values (names of the layout's columns) once, or as `amount` says, for every item, in every counter."""
        amounts = np.zeros(len(self._columns))
        amounts[[self._columns[value] for value in values]] = amount
        weights = np.empty(len(self._decays))
        for h, decay in enumerate(self._decays):
            if (factor := decay.rescale(now_ms)) is not None:
                self._table.sums[: self._size, h] *= factor
            weights[h] = decay.weight(now_ms)
        self._make_room(len(columns.item_keys) * self._keys_of_an_item)
        self._size = feature_kernels.add(self._table, self._size, columns, self._spec, amounts, weights)

    def _make_room(self, rows: int) -> None:
        if self._size + rows > self._capacity:
            total = self._table.sums[: self._size, -1].sum(1)
            self._keep(total > np.partition(total, self._size // 2)[self._size // 2])
        if self._size + rows > len(self._table.keys):
            self._resize(max(2 * len(self._table.keys), self._size + rows))

    def _keep(self, kept: Bool) -> None:
        """Drop the other rows."""
        rows, table = np.flatnonzero(kept), self._table
        for array in (table.keys, table.owners, table.counters, table.sums):
            array[: len(rows)] = array[: self._size][rows]
        self._size = len(rows)
        self._resize(len(table.keys))

    def _resize(self, rows: int) -> None:
        rows = 1 << (rows - 1).bit_length()
        old, self._table = self._table, self._empty(rows)
        for name in ("keys", "owners", "counters", "sums"):
            getattr(self._table, name)[: self._size] = getattr(old, name)[: self._size]
        feature_kernels.index(self._table, self._size)

    def counts(self, columns: Columns, now_ms: int) -> Float32:
        """Decayed counts [K, C, H, W] as of `now_ms`: C and W as the layout names them."""
        shape = (len(columns.item_keys), len(self._spec), *self._table.sums.shape[1:])
        out = np.empty(shape, np.float32)
        decays = np.array([decay.decay(now_ms) for decay in self._decays])
        feature_kernels.read(self._table, columns, self._spec, decays, out)
        return out

    def numbers(self, counts: Float32) -> Float32:
        """The layout's numbers [K, N] for counts [K, C, H, W]."""
        out = np.empty((len(counts), len(self._ratios.spec)), np.float32)
        feature_kernels.numbers(counts, self._ratios, out)
        return out

    def forget(self, user_key: int) -> None:
        """Drop what is counted of a user as a person; anonymous counts stay."""
        table = self._table
        gone = self._of_users[table.counters[: self._size]] & (table.owners[: self._size] == user_key)
        if gone.any():
            self._keep(~gone)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays, which nothing changes any more: what is counted while they are written is not in them."""
        table, size = self._table, self._size
        return {
            "clocks": np.array([decay.state() for decay in self._decays], np.int64).reshape(-1, 3),
            "half_lives_s": np.array([decay.half_life_ms / 1000 for decay in self._decays]),
            "keys": table.keys[:size].copy(),
            "owners": table.owners[:size].copy(),
            "counters": table.counters[:size].copy(),
            "sums": table.sums[:size].copy(),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]], **times: int) -> None:
        """Load `state`; `times`: see `ForwardDecay.restore`."""
        counted(state["sums"], "counters")
        self._size = len(state["keys"])
        self._table = Sums(
            places=np.zeros(0, np.int32),
            keys=state["keys"],
            owners=state["owners"],
            counters=state["counters"],
            sums=state["sums"],
        )
        self._resize(max(_ROOM, self._size + 1))
        saved_s = state.get("half_lives_s", np.full(len(self._decays), None)).tolist()
        for h, clock in enumerate(state["clocks"].tolist()):
            factor = self._decays[h].restore(clock, saved_s[h], **times)
            if factor != 1.0:
                self._table.sums[: self._size, h] *= factor


def columns_of(shared_keys: Int64, shared_mask: Bool, item_keys: Int64, item_mask: Bool) -> Columns:
    """Arrays that the kernels take, of the types that they were compiled for: writeable, too."""
    return Columns(
        shared_keys=kept(shared_keys, np.int64),
        shared_mask=kept(shared_mask, np.bool_),
        item_keys=kept(item_keys, np.int64),
        item_mask=kept(item_mask, np.bool_),
    )


def kept(array: npt.NDArray[Any], kind: type) -> npt.NDArray[Any]:
    """The array itself where it will do: asking first is ten times as fast as `numpy.require`, once for each event."""
    flags = array.flags
    fits = array.dtype == kind and flags.c_contiguous and flags.writeable and flags.aligned
    return array if fits else np.require(array, kind, _KEPT)


def spec_of(schema: Schema) -> Int32:
    """Where the slots of each counter lie [C, 3, 3]: see `feature_kernels.py`."""
    spec = np.zeros((len(schema.counters.slots), MAX_SLOTS, 3), np.int32)
    for counter, names in enumerate(schema.counters.slots):
        for place, name in enumerate(names):
            if (where := schema.item_columns.get(name)) is not None:
                spec[counter, place] = ITEM, where.start, where.stop - where.start
            else:
                spec[counter, place] = SHARED, 0 if name == "user" else 1 + schema.context.index(name), 1
    return spec
