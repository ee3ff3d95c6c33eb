"""Attribute values beyond an item's columns: features see what fits, rules see all that there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recsys.types import Int32, Int64

More = tuple[Int64, Int64]
"""Values beyond the columns of some rows: which of the rows each is of [m], and its key [m]."""
NONE: More = np.zeros(0, np.int64), np.zeros(0, np.int64)


class Overflow:
    """Keys that an item's columns have no room for, by attribute and row. One writer beside many readers."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[int, Int64]] = {}
        self.num_bytes = 0

    def set(self, attribute: str, row: int, keys: Iterable[int]) -> None:
        """Replace a row's further values, distinct; none of them is in its columns."""
        further = np.array(list(keys), np.int64)
        before = self._keys.get(attribute, {}).get(row)
        self.num_bytes += _bytes_of(further) - _bytes_of(before)
        if len(further):
            self._keys.setdefault(attribute, {})[row] = further
        elif rows := self._keys.get(attribute):
            rows.pop(row, None)

    def of(self, attribute: str, rows: slice | Int32) -> More:
        """The further values of these rows; a slice must begin at row 0."""
        known = self._keys.get(attribute)
        if not known:
            return NONE
        if isinstance(rows, slice):
            found = [(row, keys) for row, keys in known.copy().items() if row < rows.stop]
        else:
            found = [(at, keys) for at, row in enumerate(rows.tolist()) if (keys := known.get(row)) is not None]
        if not found:
            return NONE
        places = np.repeat(np.array([at for at, _ in found], np.int64), [len(keys) for _, keys in found])
        return places, np.concatenate([keys for _, keys in found])

    def state(self, rows: slice | Int32) -> dict[str, Any]:
        """Everything of these rows as arrays."""
        arrays = {}
        for attribute in list(self._keys):
            arrays[f"more.{attribute}.rows"], arrays[f"more.{attribute}.keys"] = self.of(attribute, rows)
        return arrays

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        for name in [n for n in arrays if n.startswith("more.") and n.endswith(".rows")]:
            attribute = name.removeprefix("more.").removesuffix(".rows")
            if not len(arrays[name]):
                continue  # an attribute of which no item has further values any more
            rows, starts = np.unique(arrays[name], return_index=True)
            parts = np.split(np.array(arrays[f"more.{attribute}.keys"], np.int64), starts[1:])
            self._keys[attribute] = dict(zip(rows.tolist(), parts, strict=True))
            self.num_bytes += sum(map(_bytes_of, parts))


def _bytes_of(keys: Int64 | None) -> int:
    return 0 if keys is None or not len(keys) else 200 + keys.nbytes
