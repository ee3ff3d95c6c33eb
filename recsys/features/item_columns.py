"""Items as columns in memory, by row number: no item record is fetched or parsed during a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from recsys.features.filters import Columns, Filters, passing
from recsys.features.item_texts import ItemTexts
from recsys.features.labels import Labels, used_keys
from recsys.features.numeric import between, bucket_of, number_of, time_ms_of
from recsys.features.overflow import Overflow
from recsys.features.schema import Schema
from recsys.features.vacancies import Readers
from recsys.keys import key_of
from recsys.types import Bool, Int32, Int64, Item

_ARRAYS = ("keys", "mask", "born", "alive")
"""Who reads two of them reads the later first: they grow in this order."""


class ItemColumns:
    """What there is to read of the items, by row; which row is whose, and when, the `Catalogue` decides. One writer beside many readers."""

    def __init__(self, schema: Schema, capacity: int, *, texts: bool) -> None:
        """Without `texts` items have columns only."""
        self.readers = Readers()
        self.arrivals = 0
        """How many items ever came that were not known, or no longer."""
        self.born: Int64 = np.zeros(capacity, np.int64)
        """Of which arrival each row's item is: newer items have larger numbers."""
        self.found: Bool = np.zeros(capacity, np.bool_)
        """Rows whose item can be found by its id."""
        self._size, self._has_texts = 0, texts
        self._texts = ItemTexts()
        self.ids, self.titles = self._texts.ids, self._texts.titles
        width = len(schema.item_slots)
        self.keys: Int64 = np.zeros((capacity, width), np.int64)
        self.mask: Bool = np.zeros((capacity, width), np.bool_)
        self.alive: Bool = np.zeros(capacity, np.bool_)
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

    def __len__(self) -> int:
        """How many rows there are, of items and between them."""
        return self._size

    @property
    def reading(self) -> Callable[[], AbstractContextManager[None]]:
        """`with catalogue.reading():` rows that are found in here keep their items until its end."""
        return self.readers.reading

    def columns(self, field: str) -> slice:
        """Where a field's columns lie in `keys` and `mask`."""
        return self._columns[field]

    def item(self, row: int) -> Item:
        """The item as it was last written."""
        return Item(
            item_id=self.ids[row],
            title=self.titles[row],
            attributes=orjson.loads(self._texts.documents.bytes_of(row)),
            deleted=not self.alive[row],
        )

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

    def state(self) -> dict[str, Any]:
        """All items as arrays, without the rows between them. A row that is written meanwhile may be either version of it, or torn."""
        size = self._size
        rows: Any = set_rows(self.found[:size])
        if len(rows) == size:
            rows = slice(0, size)  # views: a million items are not copied
        arrays: dict[str, Any] = {name: getattr(self, name)[:size][rows] for name in _ARRAYS}
        arrays |= self._texts.state(size, rows)
        for name, numbers in list(self.numbers.items()):
            arrays[f"number.{name}"] = numbers[:size][rows]
        arrays |= self.overflow.state(rows)
        return arrays | {"labels": self.labels.state(), "arrivals": np.array([self.arrivals], np.int64)}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Load what `state` returned where nothing is."""
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
        self._texts.restore(arrays)
        self.arrivals = int(arrays["arrivals"][0])
        self._size = size

    def _grow(self) -> None:
        size = 2 * len(self.alive)
        for name in ("found", *_ARRAYS):
            setattr(self, name, _grown(getattr(self, name), size))
        for name, numbers in self.numbers.items():
            self.numbers[name] = _grown(numbers, size)
            self.numbers[name][len(numbers) :] = np.nan

    def _write(self, row: int, item: Item) -> None:
        """Everything of an item into a row."""
        self._fill(row, item)
        if self._has_texts:
            self._texts.write(row, item)

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

    def _empty(self, row: int) -> None:
        """No item has the row any more."""
        self.keys[row], self.mask[row] = 0, False
        if self._has_texts:
            self._texts.empty(row)
        for numbers in self.numbers.values():
            numbers[row] = np.nan
        for name in self._attributes:
            self.overflow.set(name, row, ())

    def _keep_used_labels(self) -> None:
        if self.labels.overgrown:
            size = len(self)
            columns = {name: self._columns[name] for name in self._attributes}
            self.labels.keep(used_keys(self.keys[:size], self.mask[:size], columns))


def set_rows(mask: Bool) -> Int64:
    """The rows that are set in a mask which its writer changes meanwhile: numpy counts them first and fills in afterwards, and would
    return rubbish where there were fewer by then."""
    return np.flatnonzero(mask.copy())


def _grown(array: Any, size: int) -> Any:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
