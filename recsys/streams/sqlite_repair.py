"""A damaged file of the embedded log: what can still be read of it goes into a new one, which takes its place.

1. Copy every whole row, positions and identity to `TOPIC.db.new`. 2. Rename it to `TOPIC.db.repaired`: from here on it is whole.
3. Move the damaged file's -wal and -shm aside. 4. Keep the damaged file as `TOPIC.db.damaged-N` and let the new one take its place.
A crash before 2 begins anew, one after 2 goes on at 3. All with the topic's lock held.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recsys import metrics
from recsys.files import sync
from recsys.streams.sqlite_file import FILLER, PAGE_BYTES, SCHEMA, is_whole, mapped, only_writer

_log = logging.getLogger(__name__)
_STEP = 500
_FURTHEST = 2**40
_JUMP = 1_000_000
"""Numbers left free where the end cannot be read: more rows than the pages below a damaged one hold, so that none is given twice."""
_ROWS = "SELECT seq, time_ms, CAST(key AS BLOB), value, {crc} FROM log WHERE seq >= ? ORDER BY seq LIMIT ?"


def repaired(path: Path) -> Path:
    """Where a repaired file waits to take the place of `path`."""
    return path.with_name(path.name + ".repaired")


def mend(path: Path, inode: int | None) -> None:
    """Repair the file that had this inode, or let one that was repaired before a crash take its place (`inode` None).

    Somebody else may have done it while this process waited for the topic's lock.
    """
    with path.with_suffix(".lock").open("w") as lock_file, only_writer(lock_file):
        if repaired(path).exists():
            _take_place(path)
        elif inode is not None and path.stat().st_ino == inode:
            _repair(path)


def _repair(path: Path) -> None:
    new = path.with_name(path.name + ".new")
    for leftover in (new, new.with_name(new.name + "-journal")):
        leftover.unlink(missing_ok=True)
    with mapped(new), contextlib.closing(sqlite3.connect(new, isolation_level=None)) as target:
        target.execute(f"PRAGMA page_size={PAGE_BYTES}")
        target.execute("PRAGMA synchronous=OFF")  # it is fsync'd as a whole
        target.executescript(SCHEMA)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as damaged:
            kept, lost = _copy(damaged, target)
    sync(new)
    new.rename(repaired(path))
    metrics.DAMAGED_RECORDS.labels("log").inc(max(1, lost))
    _log.error("log file %s was damaged: %d records were read from it, at least %d were not", path, kept, lost)
    _take_place(path)


def _take_place(path: Path) -> None:
    """Steps 3 and 4."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for end in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    with contextlib.suppress(FileNotFoundError):
        os.link(path, aside)
    repaired(path).replace(path)
    sync(path.parent)
    _log.error(
        "log file %s was repaired; the damaged one is kept as %s: delete it when you do not need it", path, aside
    )


def _copy(damaged: sqlite3.Connection, target: sqlite3.Connection) -> tuple[int, int]:
    """Everything that is whole; returns how many records were, and at least how many were not."""
    last, kept, lost, since = -1, 0, 0, _FURTHEST
    with contextlib.suppress(sqlite3.Error, TypeError):
        since = damaged.execute("SELECT since FROM checked").fetchone()[0]
    target.execute("BEGIN")
    for rows in _readable(damaged):
        whole = [row for row in rows if is_whole(row, since)]
        lost += sum(row[4] != FILLER for row in rows) - len(whole)
        target.executemany(
            "INSERT OR IGNORE INTO log VALUES (?, ?, ?, ?, ?)",
            ((seq, ms, key.decode(errors="replace"), value, crc) for seq, ms, key, value, crc in whole),
        )
        kept += len(whole)
        last = max([last, *(row[0] for row in whole)])
    for table in ("positions", "identity", "checked"):
        with contextlib.suppress(sqlite3.Error):  # without them: a new log, which readers know as such
            values = damaged.execute(f"SELECT * FROM {table}").fetchall()
            marks = ", ".join("?" * len(values[0])) if values else ""
            target.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values)
    end = _end(damaged, target, last)
    if end > last + 1:
        target.execute("INSERT INTO log VALUES (?, 0, '', x'', -1)", (end - 1,))  # holds the place
    target.execute("COMMIT")
    return kept, lost + max(0, min(end - last - 1, _STEP))


def _end(damaged: sqlite3.Connection, target: sqlite3.Connection, last: int) -> int:
    with contextlib.suppress(sqlite3.Error):
        found = damaged.execute("SELECT max(seq) FROM log").fetchone()[0]
        if isinstance(found, int) and found >= last:
            return found + 1
    passed = target.execute("SELECT ifnull(max(seq), 0) FROM positions").fetchone()[0]
    return max(last + 1, passed) + _JUMP


def _readable(damaged: sqlite3.Connection) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of rows in order; what SQLite cannot read is jumped over, as little as possible."""
    at, size, query = 0, _STEP, _query(damaged)
    while True:
        try:
            rows = damaged.execute(query, (at, size)).fetchall()
        except sqlite3.Error:
            if size > 1:
                size = max(1, size // 8)
                continue
            following = _next_readable(damaged, query, at)
            if following is None:
                return
            at, size = following, _STEP
            continue
        if not rows:
            return
        yield rows
        at, size = max(at, *(row[0] for row in rows)) + 1, min(_STEP, size * 8)


def _query(damaged: sqlite3.Connection) -> str:
    try:
        damaged.execute("SELECT crc FROM log LIMIT 0")
    except sqlite3.Error:  # of an earlier release, or unreadable
        return _ROWS.format(crc="NULL")
    return _ROWS.format(crc="crc")


def _next_readable(damaged: sqlite3.Connection, query: str, at: int) -> int | None:
    """The first sequence number behind `at` from which a row can be read; None when there is none."""

    def reads(seq: int) -> bool:
        try:
            return damaged.execute(query, (seq, 1)).fetchone() is not None
        except sqlite3.Error:
            return False

    step = 1
    while not reads(at + step):
        step *= 2
        if step > _FURTHEST:
            return None
    low, high = step // 2, step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reads(at + middle) else (middle, high)
    return at + high
