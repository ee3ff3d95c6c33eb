"""The catalogue: which item has which row, and what becomes of the rows of items that were deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import orjson

from recsys.errors import CatalogueFull
from recsys.features.filters import Changes, Filters, Masks
from recsys.features.item_columns import ItemColumns
from recsys.features.key_rows import RowIndex
from recsys.features.schema import Schema
from recsys.features.vacancies import Vacancies
from recsys.keys import key_of
from recsys.types import Bool, Int32, Int64, Item

ROW_BYTES = 350
"""Of an item beside its keys, numbers and texts: vectors of the index in use and the next, what sources count, the index of ids."""
KEPT = 0.25
"""Deleted items that are still found, as a share of those alive: half knows less of what histories name, double takes a fifth more memory."""
KEPT_BELOW = 0.8
"""Of the bound: where there is less room than that, deleted items make it."""
NO_LOCK: AbstractContextManager[object] = nullcontext()


class Catalogue(ItemColumns):
    """Items by row number. One writer; readers may run beside it: a row's columns are complete before its id is found.

    A deleted item is not `alive` and keeps its row, from which an upsert revives it, while there are fewer such rows than `KEPT` of
    those alive: histories name it still. Then it is not found any more, and a new item gets the row: see `free_rows`.
    A row means an item only within `reading`. What is kept by row says so to `on_free`; what is kept for longer names keys.
    """

    def __init__(
        self, schema: Schema, limit_bytes: int = 2**62, capacity: int = 1024, keep: float = KEPT, *, texts: bool = True
    ) -> None:
        """`limit_bytes`: beyond it new items are refused. `keep`: deleted items that are still found, as a share of those alive. Without
        `texts` items have columns only."""
        super().__init__(schema, capacity, texts=texts)
        self._limit = limit_bytes
        self.on_free: list[Callable[[Int32], None]] = []
        """Called by the writer with rows that will be other items': nothing may be kept by them when it returns."""
        self._keep, self._vacancies = keep, Vacancies(self.readers)
        self._rows = RowIndex(self.keys)
        self._row_bytes = ROW_BYTES + 9 * len(schema.item_slots) + 8 * len(schema.declared)
        self.num_alive = 0
        self._changes = Changes()
        self._masks = Masks(self._changes, self.passing, lambda: (self._size, len(self.alive)))

    @property
    def num_changes(self) -> int:
        """Upserts, deletions and rows given up since it was made."""
        return self._changes.count

    @property
    def num_bytes(self) -> int:
        """What the items take, about, with what is kept of them elsewhere."""
        rows = (self._size - self._vacancies.num_without) * self._row_bytes
        return rows + self._texts.num_bytes + self.overflow.num_bytes + self.labels.num_bytes

    @property
    def full_ratio(self) -> float:
        """How full it is; at 1 new items are refused."""
        return self.num_bytes / self._limit

    def room_for(self, item: Item, share: float = 1.0, more: int = 0) -> int:
        """What an item takes, 0 for one that is known; CatalogueFull when that, and `more` bytes, goes beyond this share of the bound."""
        if item.deleted or self.row(item.item_id) is not None:
            return 0
        cost = self._row_bytes + len(item.item_id) + len(item.title) + len(orjson.dumps(dict(item.attributes)))
        if self.num_bytes + more + cost > share * self._limit:
            raise self._full(item)
        return cost

    def _full(self, item: Item) -> CatalogueFull:
        return CatalogueFull(
            f"item_id = {item.item_id[:64]!r}: the catalogue is full ({self.num_alive} items, {self.num_bytes / 1e6:.1f} of "
            f"{self._limit / 1e6:.1f} MB): delete items, or raise capacity.memory_bytes; items that are in it can be changed",
            field="item_id",
        )

    def row(self, item_id: str) -> int | None:
        """The item's row, deleted or not; None when it is not known, or no longer."""
        return self.row_of(key_of(item_id))

    def row_of(self, key: int) -> int | None:
        """As `row`, by the item's key."""
        row = self._rows.find(key)
        return row if row >= 0 else None

    def rows(self, item_ids: Sequence[str]) -> Int32:
        """Rows [n]; -1 where the item is not known."""
        return self.rows_of(np.fromiter(map(key_of, item_ids), np.int64, len(item_ids)))

    def rows_of(self, keys: Int64) -> Int32:
        """Rows of items by their keys [n]; -1 where the item is not known."""
        return self._rows.find_all(keys)

    def matching(self, filters: Filters) -> Bool:
        """Which rows [rows or more] are alive and pass the filters: to be read only, and beside it the catalogue may grow.

        The first time costs 1 to 20 ms a million rows and clause; then only rows that changed are looked at again.
        """
        return self._masks.of(filters)

    def apply(self, item: Item) -> int:
        """Upsert or delete; returns the row, -1 for the deletion of an item that is not known. CatalogueFull: nothing was changed."""
        row = self.row(item.item_id)
        if item.deleted:
            return -1 if row is None else self._delete(row)
        if row is None:
            return self._insert(item)
        self._write(row, item)
        if not self.alive[row]:
            self._vacancies.revive(row)
            self.num_alive += 1
        self.alive[row] = True
        self._changes.add(row)
        return row

    def _delete(self, row: int) -> int:
        if self.alive[row]:
            self._vacancies.leave(row)
            self.num_alive -= 1
        self.alive[row] = False
        self._changes.add(row)
        return row

    def _insert(self, item: Item) -> int:
        if self.num_bytes + self._row_bytes > self._limit:
            raise self._full(item)
        row = self._vacancies.take()
        if row is None:
            row = self._size
            if row == len(self.alive):
                self._grow()
        self._write(row, item)
        self._size = max(self._size, row + 1)
        self.born[row], self.arrivals = self.arrivals, self.arrivals + 1
        self.alive[row] = self.found[row] = True
        self._rows.add(self.keys, np.array([row], np.int32))
        self.num_alive += 1
        self._changes.add(row)
        return row

    def free_rows(self, lock: AbstractContextManager[object] = NO_LOCK) -> None:
        """Give up the rows of items deleted longest ago, beyond what is kept of them, and let new items have those that nobody holds any
        more. The writer calls it, after changes; it takes as many at once as are worth telling everybody.

        `lock`: held by those who find a row and keep something by it; held here only while items stop being found, not while all are told.
        """
        keep = int(self._keep * self.num_alive) if self.full_ratio < KEPT_BELOW else 0
        batch, spare = max(1, len(self) // 100), self._vacancies.num_left - keep
        if spare >= batch or (spare > 0 and not keep):
            with lock:
                rows = self._vacancies.give_up(keep)
                self._rows.remove(rows)
                self.found[rows] = False
            for row in rows.tolist():
                self._changes.add(row)
            if len(rows):
                for told in self.on_free:
                    told(rows)
                self._vacancies.rest(rows)
        for row in self._vacancies.rested():
            self._empty(row)
            self._vacancies.free(row)
        self._keep_used_labels()

    def restore(self, arrays: Mapping[str, Any]) -> None:
        super().restore(arrays)
        size = len(self)
        self.num_alive = int(np.count_nonzero(self.alive))
        for row in np.flatnonzero(~self.alive[:size]).tolist():
            self._vacancies.leave(row)
        self._rows.add(self.keys, np.arange(size, dtype=np.int32))
        self._changes.everything()
