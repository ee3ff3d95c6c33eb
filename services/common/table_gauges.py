"""What trainer and parameter service show of their tables."""

from __future__ import annotations

from recsys import metrics
from recsys.table.base import Table
from recsys.table.tables import Tables


class TableGauges:
    """Gauges and counters of each table. What went before a table is first shown is not counted: a restart runs old steps again."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[Table, int, int]] = {}

    def show(self, tables: Tables) -> None:
        for layout, table in tables.items():
            metrics.TABLE_ROWS.labels(layout).set(len(table))
            metrics.TABLE_BYTES.labels(layout).set(table.memory_bytes())
            metrics.TABLE_FULL_RATIO.labels(layout).set(len(table) / table.layout.capacity)
            known, evicted, refused = self._counted.get(layout, (None, 0, 0))
            if known is table:
                metrics.TABLE_EVICTED_ROWS.labels(layout).inc(table.evicted - evicted)
                metrics.TABLE_REFUSED_KEYS.labels(layout).inc(table.refused - refused)
            self._counted[layout] = (table, table.evicted, table.refused)
