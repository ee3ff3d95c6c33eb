"""All tables of a model, by name of their layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from recsys.errors import ConfigError
from recsys.table.base import Layout, Table
from recsys.table.cpu import CpuTable, warm_up
from recsys.table.reference import ReferenceTable

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

    def __init__(self, layouts: Sequence[Layout], implementation: Implementation = "cpu") -> None:
        names = [layout.name for layout in layouts]
        if len(set(names)) != len(names):
            raise ValueError(f"layouts must have distinct names, got {names}")
        self._tables: dict[str, Table] = {layout.name: _table(layout, implementation) for layout in layouts}

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


def _table(layout: Layout, implementation: Implementation) -> Table:
    if implementation == "cuda":
        from recsys.table.cuda import CudaTable  # loads torch and triton

        return CudaTable(layout)
    if implementation == "reference":
        return ReferenceTable(layout)
    warm_up()
    return CpuTable(layout)
