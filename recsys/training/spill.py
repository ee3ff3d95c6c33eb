"""Features of open impressions, in append-only files, one a minute of log time: memory holds only where they lie.

Partitions are not read in step, so an impression may be older than the one before it: it goes into the newest file.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from recsys.errors import SnapshotCorrupt

MAX_FILES = 16
"""Open at once: a window of a day has 1,440 of them. Minutes are written and closed in order, so that few are used at a time."""


class Place(NamedTuple):
    """Where one impression's features lie."""

    minute: int
    offset: int
    length: int
    crc: int | None = None
    """CRC-32 of them; None: an earlier release did not keep it."""


class Spill:
    """Files `<minute>.features` in a folder of its own. Not thread-safe; what lies beyond `sizes()` after a crash is cut off."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: OrderedDict[int, int] = OrderedDict()
        """Descriptors of open ones, the one used last at the end."""
        self._sizes: dict[int, int] = {}
        self._open: Counter[int] = Counter()
        self.begun: int | None = None
        """The minute of log time in which the newest file was begun; its name may be later."""

    def append(self, now_ms: int, data: bytes) -> Place:
        minute = self._minute(now_ms // 60_000)
        file = self._file(minute)
        offset = self._sizes.setdefault(minute, 0)
        if os.pwrite(file, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path(minute)))
        self._sizes[minute] = offset + len(data)
        self._open[minute] += 1
        return Place(minute, offset, len(data), zlib.crc32(data))

    def _minute(self, now: int) -> int:
        """The file to append to: the newest, or one behind it where that is of an earlier minute."""
        newest = max(self._sizes, default=None)
        if newest is None or now > (newest if self.begun is None else self.begun):
            self.begun = now
            return now if newest is None else max(now, newest + 1)
        if self.begun is None:
            self.begun = now
        return newest

    def set_back(self) -> None:
        """Log time went back: a new minute of it begins a new file, though files of later names are there."""
        self.begun = None

    def read(self, place: Place) -> bytes:
        """What was appended there. SnapshotCorrupt when it is torn or flipped: only this impression is lost."""
        data = os.pread(self._file(place.minute), place.length, place.offset)
        if len(data) < place.length or place.crc not in (None, zlib.crc32(data)):
            raise SnapshotCorrupt(
                f"{self._path(place.minute)} is torn or flipped at byte {place.offset}: an impression is left out"
            )
        return data

    def release(self, place: Place) -> None:
        """The impression is closed: its features are not read again."""
        self._open[place.minute] -= 1

    def drop_closed(self) -> None:
        """Let go of files without open impressions, never the newest; they stay on disk until `sweep`."""
        newest = max(self._sizes, default=0)
        for minute in [m for m in self._sizes if m < newest and not self._open[m]]:
            if (file := self._files.pop(minute, None)) is not None:
                os.close(file)
            del self._sizes[minute], self._open[minute]

    def sweep(self, kept: Collection[str]) -> None:
        """Delete files of minutes that no checkpoint on disk needs (`kept`) and that are not in use."""
        for path in self._folder.glob("*.features"):
            if path.stem not in kept and int(path.stem) not in self._sizes:
                path.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes in each minute's file."""
        return {str(minute): size for minute, size in self._sizes.items()}

    def restore(self, sizes: dict[str, int], places: Iterable[Place], begun: int | None) -> None:
        """Go on from `sizes()`, with the places of the impressions that were open then."""
        self.begun = begun
        self._sizes = {int(minute): size for minute, size in sizes.items()}
        self._open = Counter(place.minute for place in places)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = OrderedDict()

    def _file(self, minute: int) -> int:
        if minute in self._files:
            self._files.move_to_end(minute)
            return self._files[minute]
        if len(self._files) == MAX_FILES:
            os.close(self._files.popitem(last=False)[1])
        begins = 0 if minute in self._sizes else os.O_TRUNC  # another run may have left one
        self._files[minute] = os.open(self._path(minute), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | begins, 0o666)
        return self._files[minute]

    def _path(self, minute: int) -> Path:
        return self._folder / f"{minute}.features"
