"""One topic's file of the embedded event log."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from recsys import metrics
from recsys.clock import Clock
from recsys.errors import LogError, LogFull, LogTruncated, LogUnavailable
from recsys.streams.base import TRANSIENT
from recsys.streams.watch import touch

_log = logging.getLogger(__name__)
SCHEMA = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, time_ms INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, crc INTEGER);
CREATE TABLE IF NOT EXISTS positions (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS identity (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checked (since INTEGER PRIMARY KEY);
"""
"""`crc` is of sequence number, time, key and value; rows before `checked.since` were written by an earlier release, without."""
FILLER = -1
"""The checksum of a row that holds a place and nothing else."""
Row = tuple[int, int, bytes, bytes]
_COMPACTED = ("item",)
"""Topics of which the newest record of each key is never dropped."""
DELETED_MS = 86_400_000
"""Deletions are kept for this long, as Kafka does: a reader that was away for less learns of them."""
_DELETION_BYTES = 1000
"""A deletion is an id of up to 256 bytes and a few words: what is longer need not be parsed."""
PAGE_BYTES = 8192
"""An impression (7 KB) fits one page; at 4 KB it takes an overflow chain and reading is a third slower."""
_SHORTEN_EVERY_BYTES = 4 * 2**20
"""Retention is looked at after this many appended bytes: 2x drops 2x as much at once, 0.5x looks twice as often."""


class mapped:  # noqa: N801 - used as contextlib's are: of a poll's 6 µs a generator takes 1, this half
    """Map SQLite's errors to ours, naming the file and the remedy."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise _ours(self._path, error) from error


def _ours(path: Path, error: sqlite3.Error) -> LogError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_FULL", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
        return LogFull(f"log file {str(path)!r} cannot be written ({error}): free disk space, check its permissions")
    if name.startswith("SQLITE_BUSY"):
        return LogUnavailable(f"log file {str(path)!r} is locked by another process: find it with `fuser {path}`")
    return Damaged(f"log file {str(path)!r} is damaged or not a log ({error})")


class Damaged(LogError):
    """SQLite cannot make sense of the file: see `sqlite_repair`."""


class Replaced(LogError):
    """Another file took this one's place while somebody waited for it."""


def checksum(seq: int, time_ms: int, key: bytes, value: bytes) -> int:
    """CRC-32 of one row."""
    return zlib.crc32(value, zlib.crc32(key, zlib.crc32(b"%d %d " % (seq, time_ms))))


def is_whole(row: tuple[Any, ...], since: int) -> bool:
    """Whether a row is what was written; those before `since` say nothing of it."""
    seq, time_ms, key, value, crc = row
    if not (isinstance(time_ms, int) and isinstance(key, bytes) and isinstance(value, bytes)):
        return False
    return (crc is None and seq < since) or crc == checksum(seq, time_ms, key, value)


@contextlib.contextmanager
def only_writer(lock_file: IO[str]) -> Iterator[None]:
    """Queue up behind other processes in the kernel: SQLite's own waiting sleeps up to 100 ms at a time."""
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock_file, fcntl.LOCK_UN)


class LogFile:
    """One topic's file: a connection that reads and one that appends, each used by one thread at a time."""

    def __init__(self, topic: str, path: Path, durable: bool) -> None:
        self.topic = topic
        self.path = path
        self.lock = threading.Lock()
        self._unshortened_bytes = _SHORTEN_EVERY_BYTES
        self._compacted_bytes = 0
        self.lock_path = path.with_suffix(".lock")
        """Also what readers watch: see `append`."""
        self._lock_file = self.lock_path.open("w")
        with only_writer(self._lock_file), mapped(path):
            self.writing = self._connect("FULL" if durable else "NORMAL")
            self.writing.executescript(SCHEMA)
            self._add_checksums()
            self.writing.execute(
                "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT 1 FROM identity)",
                (f"sqlite:{uuid.uuid4().hex}",),
            )
            self._since: int = self.writing.execute("SELECT since FROM checked").fetchone()[0]
            self.id: str = self.writing.execute("SELECT id FROM identity").fetchone()[0]
            self.inode = path.stat().st_ino
            self._looked_s = 0.0
            self.reading = self._connect("NORMAL")
            self.reading.execute("SELECT (SELECT min(seq) FROM log), (SELECT max(seq) FROM log)").fetchone()

    def _add_checksums(self) -> None:
        columns = [column[1] for column in self.writing.execute("PRAGMA table_info(log)")]
        if "crc" not in columns:
            self.writing.execute("ALTER TABLE log ADD COLUMN crc INTEGER")
            _log.info("log file %s: records get a checksum from now on", self.path)
        self.writing.execute(
            "INSERT INTO checked SELECT (SELECT ifnull(max(seq), -1) + 1 FROM log) WHERE NOT EXISTS (SELECT 1 FROM checked)"
        )

    def replaced(self, within_s: float = 0.0) -> bool:
        """Whether somebody deleted the file, or put another in its place: what is open is then seen by nobody else. `within_s`: False
        where it was not so long ago."""
        now_s = time.monotonic()
        if now_s < self._looked_s + within_s:
            return False
        try:
            other = self.path.stat().st_ino != self.inode
        except OSError:
            other = True
        self._looked_s = 0.0 if other else now_s
        return other

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        return connection

    def append(self, messages: Sequence[tuple[str, bytes]], clock: Clock) -> None:
        """Append in one transaction: times that never go back. Then tell the readers.

        Replaced: nothing was appended, open the file anew.
        """
        with only_writer(self._lock_file), mapped(self.path):
            if self.replaced():
                raise Replaced(f"log file {str(self.path)!r} was replaced")
            self._append(messages, clock)
        touch(self._lock_file.fileno())

    def _append(self, messages: Sequence[tuple[str, bytes]], clock: Clock) -> None:
        with self._transaction():
            last = self.writing.execute("SELECT seq, time_ms FROM log ORDER BY seq DESC LIMIT 1").fetchone()
            seq, time_ms = last if last is not None else (-1, 0)
            time_ms = max(time_ms, clock.now_ms())
            self.writing.executemany(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?)",
                (
                    (seq + i, time_ms, key, value, checksum(seq + i, time_ms, key.encode(), value))
                    for i, (key, value) in enumerate(messages, 1)
                ),
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.writing.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.writing.execute("COMMIT")
        except BaseException:
            if self.writing.in_transaction:
                self.writing.execute("ROLLBACK")
            raise

    def _compact(self, now_ms: int) -> None:
        """Of what every committed group has passed keep the newest row of each key, and none of a key deleted long ago. What somebody is
        still to read stays whole, with what it replaces: who goes on from there finds the state of then."""
        last, passed = self.writing.execute(
            "SELECT (SELECT max(seq) FROM log), (SELECT min(seq) FROM positions)"
        ).fetchone()
        stop = last + 1 if passed is None else passed
        self.writing.execute(
            "DELETE FROM log WHERE seq < ?1 AND seq NOT IN (SELECT max(seq) FROM log WHERE seq < ?1 GROUP BY key)",
            (stop,),
        )
        # The newest row stays, so that no number is given twice.
        self.writing.execute(
            "DELETE FROM log WHERE seq < ? AND time_ms < ? AND length(value) < ? AND CASE WHEN length(value) = 0 THEN 1 "
            "WHEN json_valid(CAST(value AS TEXT)) THEN json_extract(CAST(value AS TEXT), '$.deleted') = 1 END",
            (min(stop, last), now_ms - DELETED_MS, _DELETION_BYTES),
        )

    def shorten(self, appended_bytes: int, retention_bytes: int, now_ms: int) -> None:
        """Drop the oldest rows that every committed group has passed, while the file holds more than it may."""
        self._unshortened_bytes += appended_bytes
        if self._unshortened_bytes < _SHORTEN_EVERY_BYTES:
            return
        self._unshortened_bytes = 0
        with only_writer(self._lock_file), mapped(self.path):
            if self.topic in _COMPACTED:
                if self._used_bytes() > max(retention_bytes, 2 * self._compacted_bytes):
                    self._compact(now_ms)
                    self._compacted_bytes = self._used_bytes()
                return
            # The newest row stays whatever its size, so that a sequence number is never given twice.
            first, last = self.writing.execute(
                "SELECT (SELECT min(seq) FROM log), (SELECT max(seq) FROM log)"
            ).fetchone()
            passed = self.writing.execute("SELECT min(seq) FROM positions").fetchone()[0]
            stop = last if passed is None else min(last, passed)
            if passed is not None and self.topic in TRANSIENT:
                retention_bytes = 0
            while first < stop and self._used_bytes() > retention_bytes:
                first = min(first + 500, stop)
                self.writing.execute("DELETE FROM log WHERE seq < ?", (first,))

    def _used_bytes(self) -> int:
        pages, free = (
            self.writing.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
        )
        return (pages - free) * PAGE_BYTES

    def end(self) -> int:
        last = self.reading.execute("SELECT max(seq) FROM log").fetchone()[0]
        return 0 if last is None else last + 1

    def begin(self) -> int:
        first = self.reading.execute("SELECT min(seq) FROM log").fetchone()[0]
        return 0 if first is None or self.topic in _COMPACTED else first

    def read(self, offset: int, limit: int) -> tuple[list[Row], int]:
        """Whole rows from `offset` on and the offset behind them; what is damaged is skipped and counted."""
        # Two statements instead of one: an empty poll costs only the first.
        end = self.end()
        if offset == end:
            return [], offset
        rows = self.reading.execute(
            "SELECT seq, time_ms, CAST(key AS BLOB), value, crc FROM log WHERE seq >= ? ORDER BY seq LIMIT ?",
            (offset, limit),
        ).fetchall()
        if offset > end or offset < 0 or (rows and rows[0][0] != offset and offset < self.begin()):
            raise LogTruncated(
                f"{self.topic}/0: offset {offset} is outside {self.begin()}..{self.end()} of {str(self.path)!r}: "
                "restore the file, or go on behind the gap with `--accept-gap`"
            )
        numbers = [row[0] for row in rows]
        if numbers and numbers[-1] >= end:
            end = self.end()  # more was appended between the two statements
        if not rows or numbers[-1] >= end or any(b <= a for a, b in zip(numbers, numbers[1:], strict=False)):
            raise Damaged(f"log file {str(self.path)!r} is damaged: its rows are out of order from {offset} on")
        whole = [row[:4] for row in rows if is_whole(row, self._since)]
        if bad := sum(row[4] != FILLER for row in rows) - len(whole):
            metrics.DAMAGED_RECORDS.labels("log").inc(bad)
            _log.error(
                "log file %s: %d damaged records between %d and %d are skipped", self.path, bad, offset, numbers[-1]
            )
        return whole, numbers[-1] + 1

    def close(self) -> None:
        self.writing.close()
        self.reading.close()
        self._lock_file.close()
