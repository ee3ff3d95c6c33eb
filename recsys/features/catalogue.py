"""The catalogue as columns in memory: no item record is fetched or parsed during a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from recsys.errors import CatalogueFull
from recsys.features.filters import Changes, Columns, Filters, Masks, passing
from recsys.features.key_rows import RowIndex
from recsys.features.labels import Labels, used_keys
from recsys.features.numeric import between, bucket_of, number_of, time_ms_of
from recsys.features.overflow import Overflow
from recsys.features.schema import Schema
from recsys.features.texts import Texts
from recsys.features.vacancies import Readers, Vacancies
from recsys.keys import key_of
from recsys.types import Bool, Int32, Int64, Item

ROW_BYTES = 350
"""Of an item beside its keys, numbers and texts: vectors of the index in use and the next, what sources count, the index of ids."""
KEPT = 0.25
"""Deleted items that are still found, as a share of those alive: half knows less of what histories name, double takes a fifth more memory."""
KEPT_BELOW = 0.8
"""Of the bound: where there is less room than that, deleted items make it."""
NO_LOCK: AbstractContextManager[object] = nullcontext()
_TEXTS = ("ids", "titles", "documents")
_ARRAYS = ("keys", "mask", "born", "alive")
"""Who reads two of them reads the later first: they grow in this order."""


class Catalogue:
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
        self._limit = limit_bytes
        self.readers = Readers()
        self.on_free: list[Callable[[Int32], None]] = []
        """Called by the writer with rows that will be other items': nothing may be kept by them when it returns."""
        self._keep, self._vacancies = keep, Vacancies(self.readers)
        self.arrivals = 0
        """How many items ever came that were not known, or no longer."""
        self.born: Int64 = np.zeros(capacity, np.int64)
        """Of which arrival each row's item is: newer items have larger numbers."""
        self.found: Bool = np.zeros(capacity, np.bool_)
        """Rows whose item can be found by its id."""
        self._size, self._has_texts = 0, texts
        self.ids, self.titles, self.documents = Texts(), Texts(), Texts()
        width = len(schema.item_slots)
        self.keys: Int64 = np.zeros((capacity, width), np.int64)
        self.mask: Bool = np.zeros((capacity, width), np.bool_)
        self.alive: Bool = np.zeros(capacity, np.bool_)
        self._rows = RowIndex(self.keys)
        self._row_bytes = ROW_BYTES + 9 * width + 8 * len(schema.declared)
        self._columns = schema.item_columns
        self._attributes = [name for name, _ in schema.item_fields[1:]]
        self._edges = schema.edges
        self._times = {name for kind, name in schema.declared if kind == "time"}
        numbers = {name for kind, name in schema.declared if kind == "number"}
        self._others = sorted((numbers | self._times) - set(self._attributes))
        self.labels = Labels()
        self.numbers: dict[str, npt.NDArray[np.float64]] = {}
        """Attribute -> its values [rows] where it was ever a number, NaN where it is none."""
        self.overflow = Overflow()
        """Values that have no column: for rules, which look at all that an item has."""
        self.num_alive = 0
        self._changes = Changes()
        self._masks = Masks(self._changes, self.passing, lambda: (self._size, len(self.alive)))

    def __len__(self) -> int:
        """How many rows there are, of items and between them."""
        return self._size

    @property
    def num_changes(self) -> int:
        """Upserts, deletions and rows given up since it was made."""
        return self._changes.count

    @property
    def num_bytes(self) -> int:
        """What the items take, about, with what is kept of them elsewhere."""
        rows = (self._size - self._vacancies.num_without) * self._row_bytes
        texts = self.ids.num_bytes + self.titles.num_bytes + self.documents.num_bytes
        return rows + texts + self.overflow.num_bytes + self.labels.num_bytes

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

    @property
    def reading(self) -> Callable[[], AbstractContextManager[None]]:
        """`with catalogue.reading():` rows that are found in here keep their items until its end."""
        return self.readers.reading

    def columns(self, field: str) -> slice:
        """Where a field's columns lie in `keys` and `mask`."""
        return self._columns[field]

    def row(self, item_id: str) -> int | None:
        """The item's row, deleted or not; None when it is not known, or no longer."""
        row = self._rows.find(key_of(item_id))
        return row if row >= 0 else None

    def rows(self, item_ids: Sequence[str]) -> Int32:
        """Rows [n]; -1 where the item is not known."""
        return self.rows_of(np.fromiter(map(key_of, item_ids), np.int64, len(item_ids)))

    def rows_of(self, keys: Int64) -> Int32:
        """Rows of items by their keys [n]; -1 where the item is not known."""
        return self._rows.find_all(keys)

    def item(self, row: int) -> Item:
        """The item as it was last written."""
        return Item(
            item_id=self.ids[row],
            title=self.titles[row],
            attributes=orjson.loads(self.documents.bytes_of(row)),
            deleted=not self.alive[row],
        )

    def matching(self, filters: Filters) -> Bool:
        """Which rows [rows or more] are alive and pass the filters: to be read only, and beside it the catalogue may grow.

        The first time costs 1 to 20 ms a million rows and clause; then only rows that changed are looked at again.
        """
        return self._masks.of(filters)

    def passing(self, filters: Filters, where: slice | Int32) -> Bool:
        """Which of these rows are alive and pass the filters, looked up one by one."""
        passed = self.alive[where].copy()
        for clause in filters:
            columns, numbers = self._columns[clause.attribute], self.numbers.get(clause.attribute)
            keys, mask = self.keys[where], self.mask[where]
            passed &= passing(
                clause,
                Columns(
                    keys[:, columns],
                    mask[:, columns],
                    None if numbers is None else numbers[where],
                    clause.attribute in self._edges,
                    self.overflow.of(clause.attribute, where),
                ),
            )
        return passed

    def newest(self, count: int, allowed: Bool | None = None) -> Int32:
        """The `count` alive (allowed) items that came last, newest first."""
        rows = set_rows(self.alive if allowed is None else allowed)
        if len(rows) > count:
            rows = rows[np.argpartition(self.born[rows], len(rows) - count)[-count:]] if count else rows[:0]
        return rows[np.argsort(-self.born[rows], kind="stable")].astype(np.int32)

    def page(self, after: int | None, limit: int) -> list[Item]:
        """Up to `limit` alive items in the order of their keys, from behind the key `after` on."""
        with self.reading():
            rows = set_rows(self.alive)
            keys = self.keys[rows, 0]
            if after is not None:
                rows, keys = rows[keys > after], keys[keys > after]
            if len(rows) > limit:
                least = np.argpartition(keys, limit - 1)[:limit]
                rows, keys = rows[least], keys[least]
            return [self.item(row) for row in rows[np.argsort(keys)].tolist()]

    def apply(self, item: Item) -> int:
        """Upsert or delete; returns the row, -1 for the deletion of an item that is not known. CatalogueFull: nothing was changed."""
        row = self.row(item.item_id)
        if item.deleted:
            return -1 if row is None else self._delete(row)
        if row is None:
            return self._insert(item)
        self._fill(row, item)
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
        self._fill(row, item)
        self._write(row, item)
        self._size = max(self._size, row + 1)
        self.born[row], self.arrivals = self.arrivals, self.arrivals + 1
        self.alive[row] = self.found[row] = True
        self._rows.add(self.keys, np.array([row], np.int32))
        self.num_alive += 1
        self._changes.add(row)
        return row

    def _write(self, row: int, item: Item) -> None:
        if not self._has_texts:
            return
        # The id, too: a row restored from a file may hold the key of one item and the id of the one before.
        for texts, text in (
            (self.titles, item.title),
            (self.documents, orjson.dumps(dict(item.attributes))),
            (self.ids, item.item_id),
        ):
            if row == len(texts):
                texts.append(text)
            else:
                texts[row] = text

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
        if self.labels.overgrown:
            size = len(self)
            columns = {name: self._columns[name] for name in self._attributes}
            self.labels.keep(used_keys(self.keys[:size], self.mask[:size], columns))

    def _empty(self, row: int) -> None:
        self.keys[row], self.mask[row] = 0, False
        if self._has_texts:
            for texts in (self.ids, self.titles, self.documents):
                texts[row] = ""
        for numbers in self.numbers.values():
            numbers[row] = np.nan
        for name in self._attributes:
            self.overflow.set(name, row, ())

    def state(self) -> dict[str, Any]:
        """All items as arrays, without the rows between them. A row that is written meanwhile may be either version of it, or torn."""
        size = self._size
        rows: Any = set_rows(self.found[:size])
        if len(rows) == size:
            rows = slice(0, size)  # views: a million items are not copied
        arrays: dict[str, Any] = {name: getattr(self, name)[:size][rows] for name in _ARRAYS}
        for name in _TEXTS:
            arrays[f"{name}.starts"], arrays[f"{name}.buffer"] = getattr(self, name).state(size, rows)
        for name, numbers in list(self.numbers.items()):
            arrays[f"number.{name}"] = numbers[:size][rows]
        arrays |= self.overflow.state(rows)
        return arrays | {"labels": self.labels.state(), "arrivals": np.array([self.arrivals], np.int64)}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Load what `state` returned into an empty catalogue."""
        assert not len(self), "only an empty catalogue is restored"
        size = len(arrays["alive"])
        capacity = max(len(self.alive), size)
        for name in _ARRAYS:
            setattr(self, name, _grown(arrays[name], capacity))
        self.found = np.arange(capacity) < size
        for name in [n.removeprefix("number.") for n in arrays if n.startswith("number.")]:
            numbers = _grown(arrays[f"number.{name}"], capacity)
            numbers[size:] = np.nan
            self.numbers[name] = numbers
        self.labels.restore(arrays["labels"])
        self.overflow.restore(arrays)
        self.arrivals = int(arrays["arrivals"][0])
        self.num_alive = int(np.count_nonzero(self.alive))
        for row in np.flatnonzero(~self.alive[:size]).tolist():
            self._vacancies.leave(row)
        for name in _TEXTS:
            getattr(self, name).restore(arrays[f"{name}.starts"], arrays[f"{name}.buffer"])
        self._size = size
        self._rows.add(self.keys, np.arange(size, dtype=np.int32))
        self._changes.everything()

    def _grow(self) -> None:
        size = 2 * len(self.alive)
        for name in ("found", *_ARRAYS):
            setattr(self, name, _grown(getattr(self, name), size))
        for name, numbers in self.numbers.items():
            self.numbers[name] = _grown(numbers, size)
            self.numbers[name][len(numbers) :] = np.nan

    def _fill(self, row: int, item: Item) -> None:
        keys = np.zeros(self.keys.shape[1], np.int64)
        mask = np.zeros(self.keys.shape[1], np.bool_)
        keys[0], mask[0] = key_of(item.item_id), True
        further: dict[str, Iterable[int]] = dict.fromkeys(self._attributes, ())
        for name in self._others:
            self._number(row, name, item.attributes.get(name))
        for name in self._attributes:
            value = item.attributes.get(name)
            self._number(row, name, value)
            if name in self._edges:
                value = bucket_of(value, self._edges[name])
            if value is None:
                continue
            where = self._columns[name]
            values = value if isinstance(value, list | tuple) else (value,)
            known = [key_of(text if isinstance(text, str) else str(text)) for text in values]
            width = where.stop - where.start
            further[name] = dict.fromkeys(key for key in known[width:] if key not in known[:width])
            for column, key, text in zip(range(where.start, where.stop), known, values, strict=False):
                keys[column], mask[column] = key, True
                if not self.labels.has(name, key):
                    label = between(self._edges[name], text) if name in self._edges else str(text)
                    self.labels.add(name, key, label)
        for name, others in further.items():
            self.overflow.set(name, row, others)
        self.keys[row], self.mask[row] = keys, mask

    def _number(self, row: int, name: str, value: Any) -> None:
        number = time_ms_of(value) if name in self._times else number_of(value)
        if not math.isnan(number) and name not in self.numbers:
            self.numbers[name] = np.full(len(self.alive), np.nan)
        if name in self.numbers:
            self.numbers[name][row] = number


def set_rows(mask: Bool) -> Int64:
    """The rows that are set in a mask which its writer changes meanwhile: numpy counts them first and fills in afterwards, and would
    return rubbish where there were fewer by then."""
    return np.flatnonzero(mask.copy())


def _grown(array: Any, size: int) -> Any:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
