"""What changed in a CPU table since somebody asked: codes beside the entries of its index, and tombstones."""

from __future__ import annotations

from recsys.table.base import Touched
from recsys.table.cursors import Cursors
from recsys.table.index import KeyIndex, group
from recsys.types import Int32, Int64


class Changes:
    """Of one index. Not thread-safe: called by whoever holds the writer's lock."""

    def __init__(self, index: KeyIndex, place_of: Int32, slot_of: Int32) -> None:
        self._index, self._place_of, self._slot_of = index, place_of, slot_of
        self.cursors = Cursors()

    def made(self, slots: Int32, keys: Int64) -> int:
        """The code of a change made now to these rows."""
        self.cursors.changed(slots, keys, self._index.positions)
        return self.cursors.code(self._index.arrays.changed[: self._index.positions])

    def since(self, cursor: str) -> Touched:
        """See `recsys.table.base.ServingTable.touched`."""
        version, after, removed_slots, removed_keys = self.cursors.take(cursor)
        positions = self._index.changed(self.cursors.code_after(after), self.cursors.listed(after))
        places, keys = self._index.identify(positions)
        _, first = group(self._place_of, removed_slots, removed_keys)
        removed_slots, removed_keys = removed_slots[first], removed_keys[first]
        gone = self._index.find(removed_slots, removed_keys)[0][1] < 0
        return Touched(
            version=version,
            slots=self._slot_of[places],
            keys=keys,
            removed_slots=removed_slots[gone],
            removed_keys=removed_keys[gone],
        )
