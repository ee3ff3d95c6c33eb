"""Named cursors over what was changed and removed: nothing is forgotten before every cursor acknowledged it."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

import numpy as np
import numpy.typing as npt

from recsys.table import upkeep
from recsys.types import Int32, Int64

MAX_CODE = 255
"""Versions that a byte beside each entry can tell apart; when they are used up, one pass over the bytes frees some."""


SCANNED = 8192
"""Entries that a pass over the change codes looks at in the .1 µs that it takes to find one listed key: of more than one key in so many
entries no list is kept. Half keeps lists that a pass would beat, double drops those that beat it."""


class Cursors:
    """A version clock, each cursor's acknowledged version, and tombstones until nobody needs them. Not thread-safe.

    Keys of rows that change are listed while they are few, so that to find them costs as much as changed, not as the table has.

    The clock moves on when a cursor takes changes, so what changes after that is newer than what was taken.
    """

    def __init__(self) -> None:
        self.now = 1
        self._acknowledged: dict[str, tuple[int, int]] = {}  # rows, tombstones
        self._removed: list[tuple[int, Int32, Int64]] = []
        self._versions: list[int] = []  # the newest version of code 1, 2, …
        self._listed: deque[tuple[int, Int32, Int64]] = deque()
        self._num_listed = 0
        self._listed_after = 0
        """What changed after this version is listed."""

    def code(self, changed: npt.NDArray[np.uint8]) -> int:
        """The code of a change made now; `changed` has all codes, and gets others when there are none left."""
        if not self._versions or self._versions[-1] < self.now:
            if len(self._versions) == MAX_CODE:
                self._free_codes(changed)
            self._versions.append(self.now)
        return len(self._versions)

    def code_after(self, version: int) -> int:
        """Changes after `version` have a code above this one: the highest there is where there are none."""
        code = bisect_right(self._versions, version)
        return code if code < len(self._versions) else MAX_CODE

    def _free_codes(self, changed: npt.NDArray[np.uint8]) -> None:
        """One code for all that every cursor acknowledged. If that does not free half of them, also one for each two
        neighbours: what was acknowledged of the older then comes again, with the newer.
        """
        oldest = min((after for after, _ in self._acknowledged.values()), default=self.now)
        first = max(bisect_right(self._versions, oldest) - 1, 0)
        kept = self._versions[first:]
        codes = np.maximum(np.arange(MAX_CODE + 1) - first, 1)
        if len(kept) > MAX_CODE // 2:
            codes = np.where(codes > 1, codes // 2 + 1, 1)
            kept = [kept[0], *kept[2::2], *(kept[-1:] if len(kept) % 2 == 0 else [])]
        codes[0] = 0
        upkeep.relabel(changed, codes.astype(np.uint8))
        self._versions = kept

    def take(self, cursor: str) -> tuple[int, int, Int32, Int64]:
        """The version of this taking, the one after which rows are due, and the (slots, keys) removed since."""
        if cursor not in self._acknowledged:
            self._acknowledged[cursor] = (0, self.now)
            self.now += 1
        rows_after, removed_after = self._acknowledged[cursor]
        due = [(slots, keys) for at, slots, keys in self._removed if at > removed_after]
        slots = np.concatenate([np.zeros(0, np.int32), *(slots for slots, _ in due)])
        keys = np.concatenate([np.zeros(0, np.int64), *(keys for _, keys in due)])
        version = self.now
        self.now += 1
        return version, rows_after, slots, keys

    def acknowledge(self, cursor: str, version: int) -> None:
        """Move on to `version`, never back. ValueError for a version that was never given out."""
        if cursor not in self._acknowledged or version >= self.now:
            raise ValueError(f"cursor {cursor!r} was never given version {version}")
        rows_after, removed_after = self._acknowledged[cursor]
        self._acknowledged[cursor] = (max(rows_after, version), max(removed_after, version))
        self._trim()

    def _trim(self) -> None:
        """Drop the tombstones that every cursor has, and from the list what all took."""
        needed = min((after for _, after in self._acknowledged.values()), default=self.now)
        self._removed = [part for part in self._removed if part[0] > needed]
        self._forget_listed(min((after for after, _ in self._acknowledged.values()), default=self.now))

    def release(self, cursor: str) -> None:
        """Forget a cursor; no version that was given to it counts any more."""
        self._acknowledged.pop(cursor, None)
        self._trim()

    def removed(self, slots: Int32, keys: Int64) -> None:
        """Keep tombstones for the cursors that exist; one born later starts from the rows alone."""
        if self._acknowledged and len(keys):
            self._removed.append((self.now, slots, keys))

    def changed(self, slots: Int32, keys: Int64, positions: int) -> None:
        """List keys of rows that change now, in a table of so many positions; duplicates and keys without a row do no harm."""
        if not self._acknowledged:  # whoever is born later gets every row
            self._listed_after = self.now
        elif len(keys):
            self._listed.append((self.now, slots.copy(), keys.copy()))
            self._num_listed += len(keys)
            if self._num_listed > positions // SCANNED:
                half = self._num_listed // 2
                while self._num_listed > half:
                    self._forget_listed(self._listed[0][0])

    def listed(self, after: int) -> tuple[Int32, Int64] | None:
        """(slots, keys) of all that changed after a version, maybe more than once; None: they are not listed."""
        if after < self._listed_after:
            return None
        due = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
        for at, slots, keys in reversed(self._listed):
            if at <= after:
                break
            due.append((slots, keys))
        return np.concatenate([slots for slots, _ in due]), np.concatenate([keys for _, keys in due])

    def _forget_listed(self, version: int) -> None:
        """Let go of what changed up to a version."""
        self._listed_after = max(self._listed_after, version)
        while self._listed and self._listed[0][0] <= version:
            self._num_listed -= len(self._listed.popleft()[2])
