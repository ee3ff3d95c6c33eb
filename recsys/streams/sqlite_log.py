"""The embedded event log: one SQLite file per topic, written and read by several processes at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys.clock import Clock
from recsys.streams.base import Watch, check_sizes
from recsys.streams.sqlite_appends import Appends
from recsys.streams.sqlite_file import Damaged, LogFile, Replaced, mapped
from recsys.streams.sqlite_folder import LogFolder
from recsys.streams.watch import watching
from recsys.types import Batch, Record


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
        self._clock = clock
        self._files = LogFolder(folder, durable_topics)
        self._appends = Appends(self._append, retention_bytes, clock)

    def watch(self, topics: Sequence[str]) -> Watch:
        return watching([self._files.file(topic).lock_path for topic in topics])

    def identity(self, topic: str, partition: int) -> str:
        return self._files.identity(topic)

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        check_sizes(topic, messages)
        self._files.file(topic)
        if messages:
            self._appends.wait(topic, messages)

    def _append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> LogFile:
        """One commit."""
        file = self._files.opened(topic)
        try:
            file.append(messages, self._clock)
        except (Damaged, Replaced) as error:
            file = self._files.open_again(topic, error if isinstance(error, Damaged) else None)
            file.append(messages, self._clock)
        return file

    def flush(self, timeout_s: float = 10.0) -> None:
        return  # an append returns after its commit, which every process sees

    def trouble(self) -> str:
        return ""

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        rows, following = self._files.ask(topic, lambda file: file.read(offset, limit))
        records = (
            Record(topic=topic, partition=0, offset=seq, key=key.decode(errors="replace"), value=value, time_ms=time_ms)
            for seq, time_ms, key, value in rows
        )
        return Batch(records, following)

    def begin(self, topic: str, partition: int) -> int:
        return self._files.ask(topic, LogFile.begin)

    def end(self, topic: str, partition: int) -> int:
        return self._files.ask(topic, LogFile.end)

    def ends(self, places: Sequence[tuple[str, int]]) -> list[int]:
        return [self.end(*place) for place in places]

    def partitions(self, topic: str) -> int:
        self._files.file(topic)
        return 1

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        file = self._files.file(topic)
        with file.lock, mapped(file.path):
            file.reading.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", (group, offset))

    def close(self) -> None:
        self._appends.close()
        self._files.close()
