"""The embedded event log: one SQLite file per topic, written and read by several processes at once."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from recsys.clock import Clock
from recsys.errors import LogError, LogFull, LogTruncated
from recsys.streams.base import Watch, check_sizes
from recsys.streams.sqlite_file import Damaged, LogFile, Replaced, mapped
from recsys.streams.sqlite_repair import mend, repaired
from recsys.streams.watch import watching
from recsys.types import Batch, Record

_log = logging.getLogger(__name__)
_GROUP_MESSAGES = 20_000
"""Most messages of one commit: about 100 ms, so that one huge append does not keep a click waiting for seconds."""
LOOK_S = 0.05
"""Whether a file is still the one that readers opened is looked at this often: half asks the system twice as much, and whoever appends
looks in any case."""
_T = TypeVar("_T")
_Append = tuple[str, Sequence[tuple[str, bytes]], "Future[None]"]


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
        self._files: dict[str, LogFile] = {}
        self._parents_files: dict[str, LogFile] = {}
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

    def _file(self, topic: str) -> LogFile:
        with self._lock:
            if self._closed:
                raise LogError("the event log is closed: open it again")
            if self._pid != os.getpid():  # forked: threads do not come along, and SQLite forbids even closing what does
                self._parents_files, self._files = self._files, {}
                self._start()
            file = self._files.get(topic)
            if file is None or file.replaced(LOOK_S):
                path = self._folder / f"{topic}.db"
                try:
                    file = self._files[topic] = self._open(topic, path)
                    if self._ids.setdefault(topic, file.id) != file.id:
                        _log.error("log file %s was replaced while it was in use: what is read from it is a gap", path)
                except OSError as error:
                    raise LogFull(f"log file {str(path)!r} cannot be made ({error}): free disk space") from error
            return file

    def _open(self, topic: str, path: Path) -> LogFile:
        if repaired(path).exists():
            mend(path, None)
        try:
            return LogFile(topic, path, topic in self._durable_topics)
        except Damaged as error:
            _log.error("%s: it is repaired, as far as it can be read", error)
            mend(path, path.stat().st_ino)
            return LogFile(topic, path, topic in self._durable_topics)

    def _ask(self, topic: str, question: Callable[[LogFile], _T]) -> _T:
        """What the topic's file says; when it is damaged, what it says once it was repaired."""
        file = self._known(topic)
        try:
            with file.lock, mapped(file.path):
                return question(file)
        except Damaged as error:
            _log.error("%s: it is repaired, as far as it can be read", error)
            mend(file.path, file.inode)
        file.replaced()  # looked at now, though it was a moment ago
        file = self._known(topic)
        with file.lock, mapped(file.path):
            return question(file)

    def _known(self, topic: str) -> LogFile:
        """The topic's file for a reader. LogTruncated when it is not the one that this process first found."""
        file = self._file(topic)
        if file.id != self._ids[topic]:
            raise LogTruncated(
                f"log file {str(file.path)!r} was deleted and made anew ({self._ids[topic]} is {file.id} now): restore it, "
                "or start again with `--accept-gap`"
            )
        return file

    def watch(self, topics: Sequence[str]) -> Watch:
        return watching([self._file(topic).lock_path for topic in topics])

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
            file = self._append(topic, messages)
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
            appended = sum(len(key) + len(value) + 20 for key, value in messages)
            file.shorten(appended, self._retention_bytes, self._clock.now_ms())

    def _append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> LogFile:
        file = self._files[topic]
        try:
            file.append(messages, self._clock)
        except (Damaged, Replaced) as error:
            if isinstance(error, Damaged):
                _log.error("%s: it is repaired, as far as it can be read", error)
                mend(file.path, file.inode)
            with self._lock:
                file = self._files[topic] = self._open(topic, file.path)
            file.append(messages, self._clock)
        return file

    def flush(self, timeout_s: float = 10.0) -> None:
        return  # an append returns after its commit, which every process sees

    def trouble(self) -> str:
        return ""

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        rows, following = self._ask(topic, lambda file: file.read(offset, limit))
        records = (
            Record(topic=topic, partition=0, offset=seq, key=key.decode(errors="replace"), value=value, time_ms=time_ms)
            for seq, time_ms, key, value in rows
        )
        return Batch(records, following)

    def begin(self, topic: str, partition: int) -> int:
        return self._ask(topic, LogFile.begin)

    def end(self, topic: str, partition: int) -> int:
        return self._ask(topic, LogFile.end)

    def ends(self, places: Sequence[tuple[str, int]]) -> list[int]:
        return [self.end(*place) for place in places]

    def partitions(self, topic: str) -> int:
        self._file(topic)
        return 1

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        file = self._file(topic)
        with file.lock, mapped(file.path):
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
