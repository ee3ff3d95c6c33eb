"""User state in one SQLite file: the embedded store."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recsys import metrics
from recsys.errors import StateUnavailable
from recsys.state.base import check_after
from recsys.state.cache import UserCache
from recsys.state.merge import UserEntry
from recsys.types import HistoryEvent, UserState, UserUpdate

# History and seen lie apart because a click changes 5 KB of one and an impression 10 KB of the other.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS history (user_id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (user_id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (user_id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS users (user_id TEXT PRIMARY KEY, day INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS users_by_day ON users (day);
CREATE TABLE IF NOT EXISTS positions (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS logs (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
# A file of before has users, but not when they were last there: they are taken for the longest away.
_OLDER = """
INSERT OR IGNORE INTO users
SELECT user_id, 0 FROM history UNION SELECT user_id, 0 FROM seen UNION SELECT user_id, 0 FROM items
"""
_TABLES = ("history", "seen", "items", "users")
_LEAVE = 100
"""Room is looked for once so many users came, and at least as many may leave at once: half asks for the file's size twice as often and
makes room more slowly, double keeps readers waiting longer."""
_DAY_MS = 86_400_000
_GET = "SELECT " + ", ".join(
    f"(SELECT value FROM {table} WHERE user_id = ?1)" for table in ("history", "seen", "items")
)


class SqliteState:
    """See StateStore. A power loss may take the last transactions, positions included: the log gives them again.

    While the file holds more than `max_bytes`, the users leave that were away for the most days; their pages are used again.
    """

    def __init__(
        self, path: Path, history_len: int, seen_len: int, max_bytes: int = 4 * 2**30, cache: UserCache | None = None
    ) -> None:
        self._path = path
        self._cache = cache or UserCache(0)
        self._max_bytes = max_bytes
        self.full_ratio = 0.0
        """Bytes in use over `max_bytes`, as of the last update."""
        self._came = _LEAVE  # how full it is is seen at the first update
        self._history_len = history_len
        self._seen_len = seen_len
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        with self._mapped():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writing = self._connect()
            if not self._writing.execute("SELECT EXISTS (SELECT 1 FROM users)").fetchone()[0]:
                self._writing.execute(_OLDER)
            self._reading = self._connect()
            self._reading.execute(_GET, ("",)).fetchone()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        return connection

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StateUnavailable(
                f"state file {str(self._path)!r} cannot be used ({error}): free disk space; if it is damaged, "
                "delete it with its -wal and -shm, it is rebuilt from the log"
            ) from error

    def apply(
        self, updates: Sequence[UserUpdate], positions: Mapping[str, int], after: Mapping[str, int] | None = None
    ) -> None:
        try:
            with self._transaction() as connection:
                found = dict(connection.execute("SELECT name, value FROM positions").fetchall())
                check_after(found, after or {})
                self._cache.stand_at(found)
                entries = self._write(connection, updates)
                left = self._make_room(connection, len(entries))
                connection.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?)", positions.items())
        except BaseException:
            self._cache.clear()
            raise
        self._cache.written(entries, left, {**found, **positions})

    def logs(self) -> dict[str, str]:
        with self._read_lock, self._mapped():
            return dict(self._reading.execute("SELECT name, value FROM logs").fetchall())

    def move(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> None:
        self._cache.clear()
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?)", positions.items())
            connection.executemany("INSERT OR REPLACE INTO logs VALUES (?, ?)", logs.items())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, self._mapped():
            connection = self._writing
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _make_room(self, connection: sqlite3.Connection, came: int) -> list[str]:
        """Where too much is kept let up to twice as many users leave as came, so that no flood of new ones is faster. Who left."""
        self._came += came
        if self._came < _LEAVE and self.full_ratio <= 1.0:
            return []
        most, self._came = max(_LEAVE, 2 * self._came), 0
        size, pages, free = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
        )
        self.full_ratio = (pages - free) * size / self._max_bytes
        if self.full_ratio <= 1.0:
            return []
        away = connection.execute("SELECT user_id FROM users ORDER BY day LIMIT ?", (most,)).fetchall()
        for table in _TABLES:
            connection.executemany(f"DELETE FROM {table} WHERE user_id = ?", away)
        metrics.USERS_LEFT.inc(len(away))
        return [user_id for (user_id,) in away]

    def _write(self, connection: sqlite3.Connection, updates: Sequence[UserUpdate]) -> dict[str, UserEntry]:
        """Apply the updates; the users they are of, changed."""
        entries: dict[str, UserEntry] = {}
        days: dict[str, int] = {}
        history: dict[str, None] = {}
        seen: dict[str, None] = {}
        for update in updates:
            user_id = update.user_id
            if (entry := entries.get(user_id)) is None:
                entry = self._cache.entry(user_id) or UserEntry(*connection.execute(_GET, (user_id,)).fetchone())
                entries[user_id] = entry
            entry.apply(update, self._history_len, self._seen_len)
            times = (event.time_ms for event in (*update.events, *update.acted))
            days[user_id] = max(days.get(user_id, 0), update.seen_ms // _DAY_MS, max(times, default=0) // _DAY_MS)
            if update.events or update.forget:
                history[user_id] = None
            if update.seen or update.forget:
                seen[user_id] = None
        for table, rows in (
            ("history", [(u, entries[u].packed_history()) for u in history]),
            ("seen", [(u, entries[u].packed_seen()) for u in seen]),
            ("items", [(u, entry.packed_items()) for u, entry in entries.items() if entry.items_changed]),
        ):
            if rows:
                connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows)
        connection.executemany(
            "INSERT INTO users VALUES (?, ?) ON CONFLICT (user_id) DO UPDATE SET day = excluded.day WHERE excluded.day > day",
            days.items(),
        )
        gone = [(user_id,) for user_id, entry in entries.items() if entry.empty]
        for table in _TABLES if gone else ():
            connection.executemany(f"DELETE FROM {table} WHERE user_id = ?", gone)
        return entries

    def get(self, user_id: str) -> UserState:
        if (known := self._cache.state(user_id)) is not None:
            return known
        changes = self._cache.changes
        with self._read_lock, self._mapped():
            entry = UserEntry(*self._reading.execute(_GET, (user_id,)).fetchone())
        return self._cache.read(user_id, entry, changes)

    def history(self, user_id: str) -> tuple[HistoryEvent, ...]:
        known = self._cache.history(user_id)
        return self.get(user_id).history if known is None else known

    def positions(self) -> dict[str, int]:
        with self._read_lock, self._mapped():
            found = dict(self._reading.execute("SELECT name, value FROM positions").fetchall())
        self._cache.stand_at(found)
        return found

    def close(self) -> None:
        with self._read_lock, self._write_lock:
            self._writing.close()
            self._reading.close()
