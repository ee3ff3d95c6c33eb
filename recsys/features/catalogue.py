"""The catalogue as columns in memory: no item record is fetched or parsed during a request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from recsys.features.filters import Changes, Columns, Filters, Masks, passing
from recsys.features.numeric import between, bucket_of, number_of, time_ms_of
from recsys.features.overflow import Overflow
from recsys.features.rows import RowIndex
from recsys.features.schema import Schema
from recsys.features.texts import Texts
from recsys.keys import key_of
from recsys.types import Bool, Int32, Int64, Item

_TEXTS = ("ids", "titles", "documents")


class Catalogue:
    """Items by row number. One writer; readers may run beside it: a row's columns are complete before its id is found.

    Rows only grow; a deleted item keeps its row and is not `alive`, an upsert revives it.
    """

    def __init__(self, schema: Schema, capacity: int = 1024) -> None:
        self.ids, self.titles, self.documents = Texts(), Texts(), Texts()
        width = len(schema.item_slots)
        self.keys: Int64 = np.zeros((capacity, width), np.int64)
        self.mask: Bool = np.zeros((capacity, width), np.bool_)
        self.alive: Bool = np.zeros(capacity, np.bool_)
        self._rows = RowIndex(self.keys)
        self._columns = schema.item_columns
        self._attributes = [name for name, _ in schema.item_fields[1:]]
        self._edges = schema.edges
        self._times = {name for kind, name in schema.declared if kind == "time"}
        numbers = {name for kind, name in schema.declared if kind == "number"}
        self._others = sorted((numbers | self._times) - set(self._attributes))
        self.labels: dict[tuple[str, int], str] = {}
        """(attribute, key) -> the value as it was written, for reasons."""
        self.numbers: dict[str, npt.NDArray[np.float64]] = {}
        """Attribute -> its values [rows] where it was ever a number, NaN where it is none."""
        self.overflow = Overflow()
        """Values that have no column: for rules, which look at all that an item has."""
        self.deleted = 0
        self._changes = Changes()
        self._masks = Masks(self._changes, self.passing, lambda: (len(self.ids), len(self.alive)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_alive(self) -> int:
        return len(self.ids) - self.deleted

    def columns(self, field: str) -> slice:
        """Where a field's columns lie in `keys` and `mask`."""
        return self._columns[field]

    def row(self, item_id: str) -> int | None:
        """The item's row, deleted or not; None when it was never seen."""
        row = self._rows.find(key_of(item_id))
        return row if row >= 0 else None

    def rows(self, item_ids: Sequence[str]) -> Int32:
        """Rows [n]; -1 where the item was never seen."""
        return self.rows_of(np.fromiter(map(key_of, item_ids), np.int64, len(item_ids)))

    def rows_of(self, keys: Int64) -> Int32:
        """Rows of items by their keys [n]; -1 where the item was never seen."""
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

    def apply(self, item: Item) -> int:
        """Upsert or delete; returns the row."""
        row = self.row(item.item_id)
        if item.deleted:
            if row is None:
                return -1
            self.deleted += int(self.alive[row])
            self.alive[row] = False
            self._changes.add(row)
            return row
        if row is None:
            row = len(self.ids)
            if row == len(self.alive):
                self._grow()
            self._fill(row, item)
            self.ids.append(item.item_id)
            self.titles.append(item.title)
            self.documents.append(orjson.dumps(dict(item.attributes)))
            self.alive[row] = True
            self._rows.add(self.keys, np.array([row], np.int32))
            self._changes.add(row)
            return row
        self._fill(row, item)
        self.titles[row] = item.title
        self.documents[row] = orjson.dumps(dict(item.attributes))
        self.deleted -= int(not self.alive[row])
        self.alive[row] = True
        self._changes.add(row)
        return row

    def state(self) -> dict[str, Any]:
        """Everything as arrays, most of them views: a row that is written meanwhile may be either version of it, or torn."""
        size = len(self.ids)
        arrays: dict[str, Any] = {"keys": self.keys[:size], "mask": self.mask[:size], "alive": self.alive[:size]}
        for name in _TEXTS:
            arrays[f"{name}.starts"], arrays[f"{name}.buffer"] = getattr(self, name).state(size)
        for name, numbers in list(self.numbers.items()):
            arrays[f"number.{name}"] = numbers[:size]
        arrays |= self.overflow.state(size)
        labels = [[name, key, text] for (name, key), text in list(self.labels.items())]
        return arrays | {"labels": np.frombuffer(orjson.dumps(labels), np.uint8)}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Load what `state` returned into an empty catalogue."""
        assert not len(self), "only an empty catalogue is restored"
        size = len(arrays["alive"])
        capacity = max(len(self.alive), size)
        self.keys, self.mask, self.alive = (_grown(arrays[n], capacity) for n in ("keys", "mask", "alive"))
        for name in [n.removeprefix("number.") for n in arrays if n.startswith("number.")]:
            numbers = _grown(arrays[f"number.{name}"], capacity)
            numbers[size:] = np.nan
            self.numbers[name] = numbers
        self.labels = {(name, key): text for name, key, text in orjson.loads(arrays["labels"].tobytes())}
        self.overflow.restore(arrays)
        self.deleted = size - int(np.count_nonzero(self.alive[:size]))
        for name in reversed(_TEXTS):  # the ids last: they say how many rows there are
            getattr(self, name).restore(arrays[f"{name}.starts"], arrays[f"{name}.buffer"])
        self._rows.add(self.keys, np.arange(size, dtype=np.int32))
        self._changes.everything()

    def _grow(self) -> None:
        size = 2 * len(self.alive)
        self.keys, self.mask = _grown(self.keys, size), _grown(self.mask, size)
        self.alive = _grown(self.alive, size)
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
                self.labels.setdefault(
                    (name, key), between(self._edges[name], text) if name in self._edges else str(text)
                )
        for name, others in further.items():
            self.overflow.set(name, row, others)
        self.keys[row], self.mask[row] = keys, mask

    def _number(self, row: int, name: str, value: Any) -> None:
        number = time_ms_of(value) if name in self._times else number_of(value)
        if not math.isnan(number) and name not in self.numbers:
            self.numbers[name] = np.full(len(self.alive), np.nan)
        if name in self.numbers:
            self.numbers[name][row] = number


def _grown(array: Any, size: int) -> Any:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
