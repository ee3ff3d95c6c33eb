"""The embedded event log: one SQLite file per topic, written and read by several processes at once."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from recsys.clock import Clock
from recsys.errors import LogError, LogFull, LogTruncated, LogUnavailable
from recsys.streams.base import check_sizes
from recsys.types import Batch, Record

_log = logging.getLogger(__name__)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, time_ms INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS positions (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS identity (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_COMPACTED = ("item",)
"""Topics of which the newest record of each key is never dropped."""
_PAGE_BYTES = 8192
"""An impression (7 KB) fits one page; at 4 KB it takes an overflow chain and reading is a third slower."""
_SHORTEN_EVERY_BYTES = 4 * 2**20
"""Retention is looked at after this many appended bytes: 2x drops 2x as much at once, 0.5x looks twice as often."""
_GROUP_MESSAGES = 20_000
"""Most messages of one commit: about 100 ms, so that one huge append does not keep a click waiting for seconds."""

_Append = tuple[str, Sequence[tuple[str, bytes]], "Future[None]"]


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    """Map SQLite's errors to ours, naming the file and the remedy."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_FULL", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
            raise LogFull(
                f"log file {str(path)!r} cannot be written ({error}): free disk space, check its permissions"
            ) from error
        if name.startswith("SQLITE_BUSY"):
            raise LogUnavailable(
                f"log file {str(path)!r} is locked by another process: find it with `fuser {path}`"
            ) from error
        raise LogError(
            f"log file {str(path)!r} is damaged or not a log ({error}): restore it, or move it away with its -wal and -shm"
        ) from error


class _File:
    """One topic's file: a connection that reads and one that appends, each used by one thread at a time."""

    def __init__(self, topic: str, path: Path, durable: bool) -> None:
        self.topic = topic
        self.path = path
        self.lock = threading.Lock()
        self._unshortened_bytes = _SHORTEN_EVERY_BYTES
        self._compacted_bytes = 0
        self._lock_file = path.with_suffix(".lock").open("w")
        with self.only_writer(), _mapped(path):
            self.writing = self._connect("FULL" if durable else "NORMAL")
            self.writing.executescript(_SCHEMA)
            self.writing.execute(
                "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT 1 FROM identity)",
                (f"sqlite:{uuid.uuid4().hex}",),
            )
            self.id: str = self.writing.execute("SELECT id FROM identity").fetchone()[0]
            self._inode = path.stat().st_ino
            self.reading = self._connect("NORMAL")
            self.reading.execute("SELECT (SELECT min(seq) FROM log), (SELECT max(seq) FROM log)").fetchone()

    def replaced(self) -> bool:
        """Whether somebody deleted the file, or put another in its place: what is open is then seen by nobody else."""
        try:
            return self.path.stat().st_ino != self._inode
        except OSError:
            return True

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
        connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        return connection

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Queue up behind other processes in the kernel: SQLite's own waiting sleeps up to 100 ms at a time."""
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def append(self, messages: Sequence[tuple[str, bytes]], clock: Clock) -> None:
        """Append in one transaction: sequence numbers without gaps, times that never go back."""
        with self.only_writer(), _mapped(self.path), self._transaction():
            last = self.writing.execute("SELECT seq, time_ms FROM log ORDER BY seq DESC LIMIT 1").fetchone()
            seq, time_ms = last if last is not None else (-1, 0)
            time_ms = max(time_ms, clock.now_ms())
            self.writing.executemany(
                "INSERT INTO log VALUES (?, ?, ?, ?)",
                ((seq + i, time_ms, key, value) for i, (key, value) in enumerate(messages, 1)),
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

    def shorten(self, appended_bytes: int, retention_bytes: int) -> None:
        """Drop the oldest rows that every committed group has passed, while the file holds more than it may."""
        self._unshortened_bytes += appended_bytes
        if self._unshortened_bytes < _SHORTEN_EVERY_BYTES:
            return
        self._unshortened_bytes = 0
        with self.only_writer(), _mapped(self.path):
            if self.topic in _COMPACTED:
                if self._used_bytes() > max(retention_bytes, 2 * self._compacted_bytes):
                    self.writing.execute("DELETE FROM log WHERE seq NOT IN (SELECT max(seq) FROM log GROUP BY key)")
                    self._compacted_bytes = self._used_bytes()
                return
            # The newest row stays whatever its size, so that a sequence number is never given twice.
            first, last = self.writing.execute(
                "SELECT (SELECT min(seq) FROM log), (SELECT max(seq) FROM log)"
            ).fetchone()
            passed = self.writing.execute("SELECT min(seq) FROM positions").fetchone()[0]
            stop = last if passed is None else min(last, passed)
            while first < stop and self._used_bytes() > retention_bytes:
                first = min(first + 500, stop)
                self.writing.execute("DELETE FROM log WHERE seq < ?", (first,))

    def _used_bytes(self) -> int:
        pages, free = (
            self.writing.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
        )
        return (pages - free) * _PAGE_BYTES

    def end(self) -> int:
        last = self.reading.execute("SELECT max(seq) FROM log").fetchone()[0]
        return 0 if last is None else last + 1

    def begin(self) -> int:
        first = self.reading.execute("SELECT min(seq) FROM log").fetchone()[0]
        return 0 if first is None or self.topic in _COMPACTED else first

    def read(self, offset: int, limit: int) -> list[tuple[int, int, str, bytes]]:
        # Two statements instead of one: an empty poll, every 5 ms, costs only the first.
        end = self.end()
        if offset == end:
            return []
        rows = self.reading.execute(
            "SELECT seq, time_ms, key, value FROM log WHERE seq >= ? ORDER BY seq LIMIT ?", (offset, limit)
        ).fetchall()
        if offset > end or offset < 0 or (rows[0][0] != offset and self.topic not in _COMPACTED):
            raise LogTruncated(
                f"{self.topic}/0: offset {offset} is outside {self.begin()}..{self.end()} of {str(self.path)!r}: "
                "restore the file, or go on behind the gap with `--accept-gap`"
            )
        return rows

    def close(self) -> None:
        self.writing.close()
        self.reading.close()
        self._lock_file.close()


class SqliteLog:
    """See EventLog. One partition per topic. A thread of this process groups the appends of the others into commits."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Clock,
        durable_topics: Sequence[str] = ("feedback", "impression", "item"),
        retention_bytes: int = 4 * 2**30,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._durable_topics = frozenset(durable_topics)
        self._retention_bytes = retention_bytes
        self._files: dict[str, _File] = {}
        self._parents_files: dict[str, _File] = {}
        self._ids: dict[str, str] = {}
        """Of each topic's file as this process first found it."""
        self._lock = threading.Lock()
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogFull(f"log folder {str(folder)!r} cannot be made ({error}): check `data_dir`") from error
        self._start()
        for path in sorted(folder.glob("*.db")):
            self._file(path.stem)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._writer.start()

    def _file(self, topic: str) -> _File:
        with self._lock:
            if self._closed:
                raise LogError("the event log is closed: open it again")
            if self._pid != os.getpid():  # forked: threads do not come along, and SQLite forbids even closing what does
                self._parents_files, self._files = self._files, {}
                self._start()
            if topic not in self._files or self._files[topic].replaced():
                path = self._folder / f"{topic}.db"
                try:
                    file = self._files[topic] = _File(topic, path, topic in self._durable_topics)
                    if self._ids.setdefault(topic, file.id) != file.id:
                        _log.error("log file %s was replaced while it was in use: what is read from it is a gap", path)
                except OSError as error:
                    raise LogFull(f"log file {str(path)!r} cannot be made ({error}): free disk space") from error
            return self._files[topic]

    def _known(self, topic: str) -> _File:
        """The topic's file for a reader. LogTruncated when it is not the one that this process first found."""
        file = self._file(topic)
        if file.id != self._ids[topic]:
            raise LogTruncated(
                f"log file {str(file.path)!r} was deleted and made anew ({self._ids[topic]} is {file.id} now): restore it, "
                "or start again with `--accept-gap`"
            )
        return file

    def identity(self, topic: str, partition: int) -> str:
        self._file(topic)
        return self._ids[topic]

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        check_sizes(topic, messages)
        self._file(topic)
        if messages:
            done: Future[None] = Future()
            with self._lock:  # nothing may come behind the None of close(): it would wait for ever
                if self._closed:
                    raise LogError("the event log is closed: open it again")
                self._queue.put((topic, messages, done))
            done.result()

    def _write(self) -> None:
        waiting = self._queue
        while (first := waiting.get()) is not None:
            group = [first]
            size = len(first[1])
            while size < _GROUP_MESSAGES and not waiting.empty():
                if (more := waiting.get()) is None:
                    waiting.put(None)
                    break
                group.append(more)
                size += len(more[1])
            for topic in dict.fromkeys(topic for topic, _, _ in group):
                self._commit_group(topic, [append for append in group if append[0] == topic])

    def _commit_group(self, topic: str, group: list[_Append]) -> None:
        messages = group[0][1] if len(group) == 1 else [message for _, part, _ in group for message in part]
        try:
            file = self._files[topic]
            file.append(messages, self._clock)
        except Exception as error:  # noqa: BLE001 - handed to the threads that wait, which raise it
            if len(group) > 1 and not isinstance(error, LogError):  # one caller's mistake: only that call fails
                for append in group:
                    self._commit_group(topic, [append])
                return
            for _, _, done in group:
                done.set_exception(error)
            return
        for _, _, done in group:
            done.set_result(None)
        with contextlib.suppress(LogError):  # shortening is tried again; the appends above are safe
            file.shorten(sum(len(key) + len(value) + 20 for key, value in messages), self._retention_bytes)

    def flush(self, timeout_s: float = 10.0) -> None:
        return  # an append returns after its commit, which every process sees

    def trouble(self) -> str:
        return ""

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        file = self._known(topic)
        with file.lock, _mapped(file.path):
            rows = file.read(offset, limit)
        records = [
            Record(topic=topic, partition=0, offset=seq, key=key, value=value, time_ms=time_ms)
            for seq, time_ms, key, value in rows
        ]
        return Batch(records, records[-1].offset + 1 if records else offset)

    def begin(self, topic: str, partition: int) -> int:
        file = self._known(topic)
        with file.lock, _mapped(file.path):
            return file.begin()

    def end(self, topic: str, partition: int) -> int:
        file = self._known(topic)
        with file.lock, _mapped(file.path):
            return file.end()

    def partitions(self, topic: str) -> int:
        self._file(topic)
        return 1

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        file = self._file(topic)
        with file.lock, _mapped(file.path):
            file.reading.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", (group, offset))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if self._pid == os.getpid():
            self._writer.join()
            for file in self._files.values():
                file.close()
