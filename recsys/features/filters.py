"""Filters on item attributes: evaluated over the catalogue's columns, remembered, kept up with its changes."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.features.overflow import NONE, More
from recsys.keys import key_of
from recsys.types import Bool, Int32, Int64

_FEW = 16
"""Up to so many values are compared one by one: 1 ms each over a million rows; a binary search costs 25 ms however many."""
MAX_MASKS = 32
"""Filters remembered: a byte an item each, so that double costs 32 bytes an item more."""
CHANGES = 4096
"""Latest changes of the catalogue that a remembered mask catches up with; after more of them it is made anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """What one attribute must be: one of `any`, every one of `all`, none of `none`, a number from `low` to `high`."""

    attribute: str
    any: tuple[str, ...] = ()
    all: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    @property
    def ranged(self) -> bool:
        """Whether the attribute must be a number within bounds."""
        return self.low > -math.inf or self.high < math.inf


Filters: TypeAlias = tuple[Clause, ...]
"""Every one must hold."""


@dataclass(frozen=True, slots=True)
class Columns:
    """An attribute's values of some rows: keys and mask [n, w], numbers [n] (None: the attribute never was a number); whether
    the keys are those of buckets, so that values are told by the numbers."""

    keys: Int64
    mask: Bool
    numbers: npt.NDArray[np.float64] | None
    in_buckets: bool = False
    more: More = NONE
    """Values beyond the columns."""


def passing(clause: Clause, columns: Columns) -> Bool:
    """Which rows [n] pass; a row without the attribute passes `none` alone."""
    passed = np.ones(len(columns.keys), np.bool_)
    if clause.any:
        passed &= _has(columns, clause.any)
    for value in clause.all:
        passed &= _has(columns, (value,))
    if clause.none:
        passed &= ~_has(columns, clause.none)
    if clause.ranged:
        numbers = columns.numbers
        passed &= False if numbers is None else (numbers >= clause.low) & (numbers <= clause.high)
    return passed


def _has(columns: Columns, values: tuple[str, ...]) -> Bool:
    """Which rows [n] have one of the values."""
    if columns.in_buckets:
        return np.isin(
            np.full(len(columns.keys), np.nan) if columns.numbers is None else columns.numbers, _floats(values)
        )
    wanted = np.sort(np.array([key_of(value) for value in values], np.int64))
    found = np.zeros(len(columns.keys), np.bool_)
    for column, known in zip(columns.keys.T, columns.mask.T, strict=True):
        if len(wanted) <= _FEW:
            hit = np.zeros(len(column), np.bool_)
            for key in wanted:
                hit |= column == key
        else:
            hit = wanted[np.searchsorted(wanted[:-1], column)] == column
        found |= hit & known
    places, keys = columns.more
    if len(keys):
        found[places[np.isin(keys, wanted)]] = True
    return found


def _floats(values: tuple[str, ...]) -> list[float]:
    found = []
    for value in values:
        with contextlib.suppress(ValueError):
            found.append(float(value))
    return found


class Changes:
    """Numbers the changes of the catalogue's rows and keeps the latest. One writer, after each change; any readers."""

    def __init__(self) -> None:
        self.count = 0
        self._rows = np.zeros(CHANGES, np.int32)

    def add(self, row: int) -> None:
        self._rows[self.count % CHANGES] = row
        self.count += 1

    def everything(self) -> None:
        """All rows may have changed."""
        self.count += CHANGES

    def since(self, count: int) -> tuple[Int32 | None, int]:
        """Rows changed after the first `count` changes (None: too many to be known), and how many changes that includes."""
        now = self.count
        rows = self._rows[np.arange(count, now) % CHANGES] if now - count < CHANGES else None
        # The writer may have come round while this was read; one more is being written.
        return (rows if self.count - count < CHANGES else None), now


class Masks:
    """Which rows pass filters, remembered per filter and kept up with the catalogue's changes. Thread-safe."""

    def __init__(
        self,
        changes: Changes,
        evaluate: Callable[[Filters, slice | Int32], Bool],
        size: Callable[[], tuple[int, int]],
    ) -> None:
        self._changes, self._evaluate, self._size = changes, evaluate, size
        self._known: OrderedDict[Filters, tuple[Bool, int]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, filters: Filters) -> Bool:
        """A mask [capacity] of rows that pass; shared: to be read only."""
        with self._lock:
            mask, count = self._known.get(filters, (None, 0))
            rows, now = self._changes.since(count)
            _, capacity = self._size()  # read after the changes, so that it holds every one of them
            if mask is not None and len(mask) == capacity and rows is not None:
                if len(rows):
                    mask[rows] = self._evaluate(filters, rows)
                self._remember(filters, mask, now)
                return mask
        now = self._changes.count
        num_rows, capacity = self._size()
        mask = np.zeros(capacity, np.bool_)
        mask[:num_rows] = self._evaluate(filters, slice(0, num_rows))
        with self._lock:
            self._remember(filters, mask, now)
        return mask

    def _remember(self, filters: Filters, mask: Bool, count: int) -> None:
        self._known[filters] = mask, count
        self._known.move_to_end(filters)
        if len(self._known) > MAX_MASKS:
            self._known.popitem(last=False)
