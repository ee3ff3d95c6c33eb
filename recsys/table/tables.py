"""All tables of a model: by name of their layout, or, where each slot is in one table, by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from recsys.errors import ConfigError
from recsys.table.base import Layout, Table
from recsys.table.cpu import CpuTable
from recsys.table.memory import Room, reserve
from recsys.table.reference import ReferenceTable
from recsys.table.warm import warm_up
from recsys.types import Bool, Float32, Int32, Int64

Implementation = Literal["cpu", "reference", "cuda"]


def placed(device: Literal["auto", "cpu", "cuda"], implementation: Literal["cpu", "reference"]) -> Implementation:
    """The implementation to use where tables may lie on a device: `auto` chooses one instead of the CPU's if it is there.

    ConfigError for `cuda` where there is none."""
    if device == "cpu" or (device == "auto" and implementation != "cpu"):
        return implementation
    # Looking for the driver's file first spares machines without one from loading torch.
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        from recsys.table.cuda import available

        if available():
            return "cuda"
    if device == "cuda":
        raise ConfigError(
            'parameter.device is "cuda", but there is no CUDA device that torch can use: set "auto" or "cpu"'
        )
    return implementation


class Tables(Mapping[str, Table]):
    """One table for each layout; what is done to all of them at once."""

    def __init__(self, layouts: Sequence[Layout], implementation: Implementation = "cpu", room: Room = reserve) -> None:
        names = [layout.name for layout in layouts]
        if len(set(names)) != len(names):
            raise ValueError(f"layouts must have distinct names, got {names}")
        self._tables: dict[str, Table] = {layout.name: _table(layout, implementation, room) for layout in layouts}
        self._table_of = np.full(1 + max(max(layout.slots) for layout in layouts), -1, np.int64)
        for number, layout in enumerate(layouts):
            for slot in layout.slots:
                self._table_of[slot] = number if self._table_of[slot] == -1 else -2

    def __getitem__(self, name: str) -> Table:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        """Serving, many slots in one call: values [N, widest D] and found [N]. What is behind a row's own width is 0.

        ValueError for a slot that is in no table, or in more than one: such slots are looked up in `self[layout]`.
        """
        out, found = np.zeros((len(keys), self.dim), np.float32), np.zeros(len(keys), np.bool_)
        for table, at in self._routed(slots):
            out[at, : table.layout.dim], found[at] = table.lookup(slots[at], keys[at])
        return out, found

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        """Training, likewise. Tables before one that is full have admitted their keys then."""
        out = np.zeros((len(keys), self.dim), np.float32)
        for table, at in self._routed(slots):
            out[at, : table.layout.dim] = table.lookup_train(slots[at], keys[at], now_ms, admit)
        return out

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        """One optimiser step with gradients [N, widest D]; what is behind a row's own width is not read.

        Non-finite gradients raise ValueError, nothing changed.
        """
        routed = [(table, at, gradients[at, : table.layout.dim]) for table, at in self._routed(slots)]
        for table, _, own in routed:
            if not np.isfinite(own).all():
                raise ValueError(f"table {table.layout.name!r}: gradients are not finite; nothing was changed")
        for table, at, own in routed:
            table.apply_gradients(slots[at], keys[at], own, now_ms)

    @property
    def dim(self) -> int:
        """The widest D."""
        return max(table.layout.dim for table in self._tables.values())

    def _routed(self, slots: Int32) -> list[tuple[Table, Int64]]:
        """Each table that some of the slots are in, and which of them."""
        if slots.size and not (slots.min() >= 0 and slots.max() < len(self._table_of)):
            raise ValueError(f"no table has slot {slots.min() if slots.min() < 0 else slots.max()}")
        numbers = self._table_of[slots]
        if (numbers < 0).any():
            first = slots[np.argmax(numbers < 0)]
            raise ValueError(f"slot {first} is in {'no table' if numbers.min() == -1 else 'several tables: name one'}")
        tables = list(self._tables.values())
        return [(tables[n], np.flatnonzero(numbers == n)) for n in np.unique(numbers)]

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        """Remove expired rows of every table, looking at up to `max_rows` of each; how many were removed."""
        return sum(table.expire(now_ms, max_rows) for table in self._tables.values())

    def num_rows(self) -> int:
        """Live rows of all tables."""
        return sum(len(table) for table in self._tables.values())

    def memory_bytes(self) -> int:
        """Bytes in use by all tables."""
        return sum(table.memory_bytes() for table in self._tables.values())


def _table(layout: Layout, implementation: Implementation, room: Room) -> Table:
    if implementation == "cuda":
        from recsys.table.cuda import CudaTable  # loads torch and triton

        return CudaTable(layout)
    if implementation == "reference":
        return ReferenceTable(layout)
    warm_up(layout.precision)
    return CpuTable(layout, room)
