"""A bounded append-only queue on disk: what was accepted while the broker has not acknowledged it.

Files `<position of the first byte>.spool`, each a sequence of frames; a position counts bytes since the spool was made:

    length uint32 | crc32 uint32 | topic length uint16 | key length uint32 | topic | key | value      (little-endian)

`length` and `crc32` are of all that follows them. The file `sent` holds the position that the broker has acknowledged.
A torn tail is cut. A frame that is damaged is skipped and counted: the next one that is whole is found by its checksum.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recsys import metrics
from recsys.errors import FolderLocked, LogFull

_log = logging.getLogger(__name__)
_FRAME = struct.Struct("<II")
_NAMES = struct.Struct("<HI")
_SEGMENT_BYTES = 16 * 2**20
"""A file is deleted when all of it was sent: half makes twice the files, double keeps twice as much that was sent."""
_SYNC_S = 0.1
"""A power loss may take this much; kill -9 takes nothing, because the page cache has it."""
_ASIDE = "refused.frames"


class Spooled(NamedTuple):
    """One accepted message and the position behind it."""

    topic: str
    key: str
    value: bytes
    next: int


class Spool:
    """The queue of one process. Any thread appends; one thread reads and acknowledges. Holds its folder's lock until closed.

    Raises FolderLocked when another process has the folder, LogFull from `append` when the bound or the disk is reached.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._closing = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = (folder / "lock").open("w")
        except OSError as error:
            raise LogFull(f"spool folder {str(folder)!r} cannot be made ({error}): check `data_dir`") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderLocked(
                f"spool {str(folder)!r} is used by another process: stop it, or give this one another name"
            ) from None
        self._starts = sorted(int(path.stem) for path in folder.glob("*.spool"))
        self.sent = self._read_sent()
        self.end = self._recover()
        self._file = os.open(self._path(self._starts[-1]), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._synced = self.end
        self._moved_s = time.monotonic()
        self._reading: tuple[int, int] | None = None  # (start of the file, descriptor)
        self._syncer = threading.Thread(target=self._sync, name="spool-sync", daemon=True)
        self._syncer.start()

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:020d}.spool"

    def _read_sent(self) -> int:
        try:
            return int((self._folder / "sent").read_text())
        except FileNotFoundError:
            return self._starts[0] if self._starts else 0
        except ValueError:
            # Sending all again is safe: consumers drop duplicates.
            _log.warning("spool %s: `sent` is unreadable, everything kept is sent again", self._folder)
            return self._starts[0] if self._starts else 0

    def _recover(self) -> int:
        """Cut a torn tail off the newest file; return the position behind its last whole frame."""
        if not self._starts:
            self._starts.append(self.sent)
            return self.sent
        newest = self._path(self._starts[-1])
        data = newest.read_bytes()
        whole = at = 0
        while at < len(data):
            if (frame := _frame_at(data, at)) is not None:
                whole = at = at + _FRAME.size + len(frame)
            elif (at := _behind_damage(data, at)) < len(data) or _ends_with_frame(data, whole):
                whole = at  # something damaged, not the tail: `read` skips and counts it
        if whole < len(data):
            _log.warning("spool %s: cut %d bytes of a torn write", newest, len(data) - whole)
            os.truncate(newest, whole)
        end = self._starts[-1] + whole
        if self.sent > end:  # a power loss took the tail, but what it held was sent
            self._starts.append(self.sent)
        return max(end, self.sent)

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        """Accept all messages or none, with one write."""
        name = topic.encode()
        frames: list[bytes] = []
        for key, value in messages:
            frames += _frame(name, key, value)
        data = b"".join(frames)
        with self._changed:
            if self.end + len(data) - self.sent > self._max_bytes:
                raise LogFull(
                    f"spool {str(self._folder)!r} is full ({self._max_bytes} bytes): bring the broker back, or raise `log.spool_bytes`"
                )
            try:
                if self.end - self._starts[-1] >= _SEGMENT_BYTES:
                    self._next_segment()
                written = os.write(self._file, data)
                if written != len(data):
                    raise OSError(f"{written} of {len(data)} bytes written")
            except OSError as error:
                os.ftruncate(self._file, self.end - self._starts[-1])
                raise LogFull(f"spool {str(self._folder)!r} cannot be written ({error}): free disk space") from error
            if self.end == self.sent:
                self._moved_s = time.monotonic()
            self.end += len(data)
            self._changed.notify_all()

    def _next_segment(self) -> None:
        file = os.open(self._path(self.end), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        os.fsync(self._file)
        os.close(self._file)
        self._file = file
        self._starts.append(self.end)

    def read(self, position: int, max_bytes: int) -> tuple[list[Spooled], int]:
        """The whole frames from `position` on, up to about `max_bytes`, at least one if there is one, and the position behind them.

        Where a frame is damaged, none, and the position of the next one that is whole.
        """
        with self._changed:
            start = max(start for start in self._starts if start <= position)
            stop = min((later for later in self._starts if later > position), default=self.end)
        data = self._bytes(start, position, min(max(max_bytes, _FRAME.size), stop - position))
        need = _FRAME.size + _FRAME.unpack_from(data)[0] if len(data) >= _FRAME.size else 0
        if len(data) < need <= stop - position:
            data = self._bytes(start, position, need)
        found: list[Spooled] = []
        at = 0
        while (body := _frame_at(data, at)) is not None:
            at += _FRAME.size + len(body)
            topic_len, key_len = _NAMES.unpack_from(body)
            key_at = _NAMES.size + topic_len
            topic, key = body[_NAMES.size : key_at].decode(), body[key_at : key_at + key_len].decode()
            found.append(Spooled(topic, key, body[key_at + key_len :], position + at))
        if found or position == stop:
            return found, position + at
        behind = position + _behind_damage(self._bytes(start, position, stop - position), 0)
        metrics.DAMAGED_RECORDS.labels("spool").inc()
        _log.error(
            "spool file %s is damaged at byte %d: %d bytes are skipped, what follows is sent",
            self._path(start),
            position - start,
            behind - position,
        )
        return [], behind

    def _bytes(self, start: int, position: int, size: int) -> bytes:
        if self._reading is None or self._reading[0] != start:
            if self._reading is not None:
                os.close(self._reading[1])
            self._reading = (start, os.open(self._path(start), os.O_RDONLY))
        return os.pread(self._reading[1], size, position - start)

    def set_aside(self, message: Spooled) -> Path:
        """Keep what the broker refuses for good, in a file of its own."""
        path = self._folder / _ASIDE
        with path.open("ab") as file:
            if file.tell() < self._max_bytes:
                file.write(b"".join(_frame(message.topic.encode(), message.key, message.value)))
        return path

    @property
    def waits_s(self) -> float:
        """Seconds since anything moved, while something waits."""
        return time.monotonic() - self._moved_s if self.end > self.sent else 0.0

    def acknowledge(self, position: int) -> None:
        """Everything before `position` is with the broker: remember it and delete files that are done."""
        temporary = self._folder / "sent.new"
        temporary.write_text(str(position))
        temporary.replace(self._folder / "sent")
        with self._changed:
            self.sent, self._moved_s = position, time.monotonic()
            while len(self._starts) > 1 and self._starts[1] <= position:
                self._path(self._starts.pop(0)).unlink(missing_ok=True)
            self._changed.notify_all()

    def wait_appended(self, position: int, timeout_s: float) -> bool:
        """Wait until there is something behind `position`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.end > position, timeout_s)

    def wait_sent(self, position: int, timeout_s: float) -> bool:
        """Wait until everything before `position` is acknowledged."""
        with self._changed:
            return self._changed.wait_for(lambda: self.sent >= position, timeout_s)

    def _sync(self) -> None:
        while not self._closing.wait(_SYNC_S):
            metrics.SPOOL_BYTES.set(self.end - self.sent)
            metrics.SPOOL_FULL.set((self.end - self.sent) / self._max_bytes)
            metrics.SPOOL_WAIT_SECONDS.set(self.waits_s)
            with self._changed:
                end = self.end
                file = os.dup(self._file) if end > self._synced else -1
            if file >= 0:
                try:
                    os.fsync(file)
                except OSError as error:
                    _log.error("spool %s: fsync failed: %s", self._folder, error)
                finally:
                    os.close(file)
                self._synced = end

    def close(self) -> None:
        """Release the files and the lock. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._syncer.join()
        os.fsync(self._file)
        os.close(self._file)
        if self._reading is not None:
            os.close(self._reading[1])
        self._lock_file.close()


def _frame_at(data: bytes, at: int) -> bytes | None:
    """The body of the frame at this byte; None when it is not whole."""
    if at + _FRAME.size > len(data):
        return None
    length, checksum = _FRAME.unpack_from(data, at)
    body = data[at + _FRAME.size : at + _FRAME.size + length]
    return body if len(body) == length and length >= _NAMES.size and zlib.crc32(body) == checksum else None


def _frame(topic: bytes, key: str, value: bytes) -> tuple[bytes, bytes]:
    key_bytes = key.encode()
    body = b"".join((_NAMES.pack(len(topic), len(key_bytes)), topic, key_bytes, value))
    return _FRAME.pack(len(body), zlib.crc32(body)), body


def _behind_damage(data: bytes, at: int) -> int:
    """Where the next whole frame begins behind a damaged one at this byte; the end of the data when there is none."""
    if at + _FRAME.size <= len(data):
        following = at + _FRAME.size + _FRAME.unpack_from(data, at)[0]
        if _frame_at(data, following) is not None:  # its length was not what is damaged
            return following
    for place in range(at + 1, len(data) - _FRAME.size + 1):
        if _FRAME.unpack_from(data, place)[0] <= len(data) - place and _frame_at(data, place) is not None:
            return place
    return len(data)


def _ends_with_frame(data: bytes, at: int) -> bool:
    """Whether a frame at this byte has its whole length, though not its checksum: then it is damaged, not torn."""
    return at + _FRAME.size <= len(data) and at + _FRAME.size + _FRAME.unpack_from(data, at)[0] == len(data)
