"""Features of open impressions, in append-only files, one a minute of log time: memory holds only where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple


class Place(NamedTuple):
    """Where one impression's features lie."""

    minute: int
    offset: int
    length: int


class Spill:
    """Files `<minute>.features` in a folder of its own. Not thread-safe; what lies beyond `sizes()` after a crash is cut off."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[int, BinaryIO] = {}
        self._sizes: dict[int, int] = {}
        self._dropped: list[Path] = []

    def append(self, now_ms: int, data: bytes) -> Place:
        minute = now_ms // 60_000
        file = self._file(minute)
        offset = self._sizes.setdefault(minute, 0)
        file.seek(offset)
        file.write(data)
        self._sizes[minute] = offset + len(data)
        return Place(minute, offset, len(data))

    def read(self, place: Place) -> bytes:
        file = self._file(place.minute)
        file.seek(place.offset)
        return file.read(place.length)

    def drop_before(self, now_ms: int) -> None:
        """Let go of the files of minutes that ended before `now_ms`; they stay on disk until `take_dropped`'s caller deletes them."""
        for minute in [m for m in self._sizes if (m + 1) * 60_000 <= now_ms]:
            if file := self._files.pop(minute, None):
                file.close()
            del self._sizes[minute]
            self._dropped.append(self._path(minute))

    def take_dropped(self) -> list[Path]:
        """Files that no open impression needs. Deleted only after a checkpoint without them is committed: an older one needs them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def sizes(self) -> dict[str, int]:
        """Bytes in each minute's file, flushed."""
        for file in self._files.values():
            file.flush()
        return {str(minute): size for minute, size in self._sizes.items()}

    def restore(self, sizes: dict[str, int]) -> None:
        self._sizes = {int(minute): size for minute, size in sizes.items()}
        for path in self._folder.glob("*.features"):
            if int(path.stem) not in self._sizes:
                path.unlink()

    def _file(self, minute: int) -> BinaryIO:
        if minute not in self._files:
            path = self._path(minute)
            self._files[minute] = path.open("r+b" if path.exists() and minute in self._sizes else "w+b")
        return self._files[minute]

    def _path(self, minute: int) -> Path:
        return self._folder / f"{minute}.features"
