"""Named cursors over what was changed and removed: nothing is forgotten before every cursor acknowledged it."""

from __future__ import annotations

import numpy as np

from recsys.types import Int32, Int64


class Cursors:
    """A version clock, each cursor's acknowledged version, and tombstones until nobody needs them. Not thread-safe.

    The clock moves on when a cursor takes changes, so what changes after that is newer than what was taken.
    """

    def __init__(self) -> None:
        self.now = 1
        self._acknowledged: dict[str, tuple[int, int]] = {}  # rows, tombstones
        self._removed: list[tuple[int, Int32, Int64]] = []

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
        needed = min(after for _, after in self._acknowledged.values())
        self._removed = [part for part in self._removed if part[0] > needed]

    def removed(self, slots: Int32, keys: Int64) -> None:
        """Keep tombstones for the cursors that exist; one born later starts from the rows alone."""
        if self._acknowledged and len(keys):
            self._removed.append((self.now, slots, keys))
