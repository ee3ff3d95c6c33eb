"""All tables of a model, by name of their layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from recsys.table.base import Layout, Table
from recsys.table.cpu import CpuTable, warm_up
from recsys.table.reference import ReferenceTable


class Tables(Mapping[str, Table]):
    """One table for each layout; what is done to all of them at once."""

    def __init__(self, layouts: Sequence[Layout], implementation: Literal["cpu", "reference"] = "cpu") -> None:
        names = [layout.name for layout in layouts]
        if len(set(names)) != len(names):
            raise ValueError(f"layouts must have distinct names, got {names}")
        if implementation == "cpu":
            warm_up()
        kind = CpuTable if implementation == "cpu" else ReferenceTable
        self._tables: dict[str, Table] = {layout.name: kind(layout) for layout in layouts}

    def __getitem__(self, name: str) -> Table:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        """Remove expired rows of every table, looking at up to `max_rows` of each; how many were removed."""
        return sum(table.expire(now_ms, max_rows) for table in self._tables.values())

    def num_rows(self) -> int:
        """Live rows of all tables."""
        return sum(len(table) for table in self._tables.values())

    def memory_bytes(self) -> int:
        """Bytes in use by all tables."""
        return sum(table.memory_bytes() for table in self._tables.values())
