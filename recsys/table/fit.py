"""Rows from elsewhere into a table that may be too small for them: what is worth least goes, nothing fails."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recsys.errors import TableFull
from recsys.table import worth
from recsys.table.base import Rows, Table
from recsys.table.rows import LAST_SEEN_STEP_MS

_BURIED = 4096
"""Rows that are put back at a time, to be removed."""


def restore_within(table: Table, rows: Rows) -> int:
    """Restore rows; where they do not fit, rows of least worth make room, and of more than the table can hold those of
    least worth are left out: how many."""
    left_out = 0
    if len(rows.keys) > table.layout.capacity:
        left_out = len(rows.keys) - worth.target(table.layout)
        value = rows.last_seen_ms // LAST_SEEN_STEP_MS + worth.HALF_LIFE * rows.levels.astype(np.int64)
        rows = rows.take(~worth.least(value, worth.hashes(0, rows.slots, rows.keys), left_out))
    try:
        table.restore(rows)
    except TableFull:
        table.make_room(len(rows.keys))
        table.restore(rows)
    return left_out


def bury(tables: Mapping[str, Table], gone: Mapping[str, Rows]) -> None:
    """Let every cursor have a tombstone for rows that a table could not hold: who else has them must forget them, too."""
    for name, rows in gone.items():
        table = tables[name]
        step = max(1, min(_BURIED, table.layout.capacity // 16))
        table.make_room(step)
        for start in range(0, len(rows.keys), step):
            part = rows.take(slice(start, start + step))
            table.restore(part)
            table.remove(part.slots, part.keys)
