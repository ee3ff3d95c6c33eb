"""From (slot, key) to a row number: 16 bytes an entry, every 64-bit key legal, growing a little with every call.

An entry also says when its row was last seen, and a byte beside it when it was changed: no other array has rows.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from recsys.table import kernels, upkeep, worth
from recsys.table.cursors import MAX_CODE
from recsys.table.kernels import Index, Store
from recsys.table.memory import Room, reserve
from recsys.types import Int32, Int64, UInt8

LOAD = 0.78
"""Share of entries in use while the index grows: half as much again of memory at 0.52. The part of a round that has not
moved yet fills up to 9/8 of it, 0.88; near 1 the search for an empty entry has no end."""
_FIRST_LINES = 256
_FILLS = 2 * upkeep.MOVED_LINES
_PAD = 2**16
"""Entries behind the last home, for what overflows; a run of entries that long has no chance, see `_seed`."""
_EMPTY_STORE = Store(
    np.zeros((1, 1), np.float32),
    np.zeros((1, 1), np.float32),
    np.zeros(1, np.uint8),
    np.zeros(0, np.float32),
    np.zeros((1, 1), np.float32),
    np.zeros((0, 4), np.int64),
    np.zeros((0, 5)),
)


class KeyIndex:
    """Rows `first` (≥ 1), `first + 1`, …, at most `capacity` of them; freed rows serve later keys. One writer.

    `place_of`: each slot's place (0 … 255), or -1. `links` [rows, ≥ 1]: memory of rows, used while a row is free.
    The hash has a secret (`order`; of each index if not given): nobody can choose keys that collide, and rows that come
    in the order of another index do not fill one end of this one.
    """

    def __init__(
        self,
        capacity: int,
        first: int,
        place_of: Int32,
        links: Int32 | None = None,
        order: int | None = None,
        room: Room = reserve,
    ) -> None:
        self.first, self.order = first, secrets.randbits(63) if order is None else order % 2**63
        most = int(capacity / (4 * LOAD) * (1 + 1 / upkeep.ROUND)) + _FIRST_LINES + 64
        size = (4 * most + min(_PAD, capacity) + 128) & ~63
        meta = room((8,), np.int64)
        meta[:] = _FIRST_LINES, _FIRST_LINES, 0, first, 0, 0, self.order, 0
        self.arrays = Index(
            entries=room((size, 2), np.int64),
            changed=reserve((size,), np.uint8),
            meta=meta,
            place_of=place_of,
            links=np.zeros((first + capacity, 1), np.int32) if links is None else links,
        )

    def __len__(self) -> int:
        return int(self.arrays.meta[kernels.LIVE])

    @property
    def end(self) -> int:
        """One past the highest row ever used."""
        return int(self.arrays.meta[kernels.NEXT_ROW])

    @property
    def positions(self) -> int:
        """One past the highest position that can be in use."""
        most = int(self.arrays.meta[kernels.NEXT_LINES]) * 4
        return (most + min(_PAD, len(self)) + 63) & ~63

    @property
    def index_bytes(self) -> int:
        """Entries and change codes as far as they have been used."""
        return 17 * 4 * int(self.arrays.meta[kernels.NEXT_LINES])

    def find(self, slots: Int32, keys: Int64, stamp: int = 0, code: int = 0, tick: int = 0) -> tuple[Int32, int]:
        """`at` and how many are missing; rows that are there are seen then, changed with this code, and counted (0: not)."""
        at = np.empty((3, len(keys)), np.int32)
        missing: int = kernels.find(self.arrays, slots, keys, at, (stamp, code, tick))
        return at, missing

    def survey(self, of: tuple[int, int]) -> tuple[Int32, npt.NDArray[np.uint64]]:
        """Positions and hashes of all entries in a window of hashes: `worth.window`."""
        start, width = of
        most = min(len(self), 2 * (len(self) * width >> 32) + 4096)
        positions, hashed = np.empty(most, np.int32), np.empty(most, np.uint64)
        count = 0
        for first, last in ((start, min(start + width, 2**32)), (0, max(start + width - 2**32, 0))):
            count += upkeep.survey(self.arrays, first, last, positions[count:], hashed[count:])
        return positions[:count], hashed[:count]

    def least(self, count: int, of: tuple[int, int], kept: Int32, kept_stamp: int) -> tuple[Int32, Int64]:
        """Places and keys of the `count` entries of least worth in a window, but those at the positions `kept`, which are
        stamped `kept_stamp` or later."""
        positions, hashed = self.survey(of)
        places, keys, _, stamps, uses = self.read(positions)
        value = stamps + worth.HALF_LIFE * uses.astype(np.int64)
        gone = np.flatnonzero(worth.least(value, hashed, count))
        if len(kept) and value[gone].max(initial=0) >= kept_stamp:
            free = np.flatnonzero(~np.isin(positions, kept))
            gone = free[worth.least(value[free], hashed[free], count)]
        return places[gone], keys[gone]

    def reserve(self, extra: int) -> None:
        """Make sure that `extra` keys can be inserted."""
        if upkeep.small(self.arrays, len(self) + extra, LOAD):
            room = 4 * upkeep.MOVED_LINES + _PAD
            moving, when, fills = np.empty((room, 2), np.int64), np.empty(room, np.uint8), np.empty(_FILLS, np.uint8)
            upkeep.grow(self.arrays, len(self) + extra, LOAD, moving, when, fills)

    def insert(
        self,
        slots: Int32,
        keys: Int64,
        at: Int32,
        todo: Int32,
        store: Store = _EMPTY_STORE,
        marks: tuple[int, int, int, int] = (0, 1, 0, 0),
    ) -> int:
        """Fill `at` of the keys numbered in `todo`, new rows where missing; how many are new. `reserve` came before `find`."""
        new: int = kernels.insert(self.arrays, store, slots, keys, at, todo, marks)
        return new

    def remove(self, slots: Int32, keys: Int64) -> Int32:
        """Free the rows of the keys that are there; which of them were."""
        gone = np.empty(len(keys), np.int32)
        return gone[: upkeep.remove(self.arrays, slots, keys, gone)]

    def changed(self, after: int = 0, listed: tuple[Int32, Int64] | None = None) -> Int32:
        """Positions of all entries with a change code above `after`, in order; where their keys are `listed`, only those are looked at.
        Above the highest code there is none, and nothing is looked at."""
        if after >= MAX_CODE:
            return np.empty(0, np.int32)
        if listed is not None:
            at = self.find(*listed)[0][1]
            return np.unique(at[at >= 0])
        out = np.empty(len(self), np.int32)
        return out[: upkeep.changes(self.arrays, self.positions, after, out)]

    def identify(self, positions: Int32) -> tuple[Int32, Int64]:
        """Places and keys of entries."""
        places, keys = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
        upkeep.identify(self.arrays, positions, places, keys)
        return places, keys

    def read(self, positions: Int32) -> tuple[Int32, Int64, Int32, Int64, UInt8]:
        """Places, keys, rows, stamps and levels of uses of entries."""
        entries = self.arrays.entries.take(positions, axis=0)
        packed = entries[:, 1]
        places = (packed >> 32 & 0xFF).astype(np.int32)
        rows, stamps = (packed & kernels.MAX_ROW).astype(np.int32), packed >> 40 & kernels.MAX_STAMP
        uses = (packed >> 28 & kernels.MAX_USES).astype(np.uint8)
        return places, np.ascontiguousarray(entries[:, 0]), rows, stamps, uses

    def set_stamps(self, positions: Int32, stamps: Int64, uses: UInt8) -> None:
        """When the rows of entries were last seen, and how often; the last of duplicates."""
        packed = self.arrays.entries[:, 1]
        levels = np.minimum(uses, kernels.MAX_USES).astype(np.int64)
        packed[positions] = packed[positions] & (0xFF << 32 | kernels.MAX_ROW) | levels << 28 | stamps << 40


def planned(rows: int) -> tuple[float, int]:
    """Load and bytes of the index of a table that grew to so many rows."""
    index = KeyIndex(max(rows, 1), 1, np.zeros(1, np.int32))
    index.reserve(rows)
    return rows / (4 * int(index.arrays.meta[kernels.NEXT_LINES])), index.index_bytes


def group(place_of: Int32, slots: Int32, keys: Int64) -> tuple[Int32, Int32]:
    """Which unique pair each pair is [N], and where each unique pair occurs first [U], in order."""
    if not len(keys):
        return np.empty(0, np.int32), np.empty(0, np.int32)
    scratch = KeyIndex(len(keys), 1, place_of)
    scratch.reserve(len(keys))
    at, _ = scratch.find(slots, keys)
    scratch.insert(slots, keys, at, np.arange(len(keys), dtype=np.int32))
    which = at[0] - 1
    first = np.empty(len(scratch), np.int32)
    first[which[::-1]] = np.arange(len(keys), dtype=np.int32)[::-1]
    return which, first
