"""The event log in this process's memory: for offline replay and tests. Not durable, never shortened."""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict
from collections.abc import Sequence

from recsys.clock import Clock
from recsys.errors import LogTruncated
from recsys.streams.base import Watch, check_sizes
from recsys.streams.watch import AskOften
from recsys.types import Batch, Record


class MemoryLog:
    """See EventLog. One partition per topic."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._topics: defaultdict[str, list[Record]] = defaultdict(list)
        self._lock = threading.Lock()
        self._id = f"memory:{uuid.uuid4().hex}"

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        check_sizes(topic, messages)
        with self._lock:
            records = self._topics[topic]
            now_ms = self._clock.now_ms()
            if records:
                now_ms = max(now_ms, records[-1].time_ms)
            start = len(records)
            records.extend(
                Record(topic=topic, partition=0, offset=start + i, key=key, value=value, time_ms=now_ms)
                for i, (key, value) in enumerate(messages)
            )

    def flush(self, timeout_s: float = 10.0) -> None:
        return

    def trouble(self) -> str:
        return ""

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        records = self._topics[topic]
        if not 0 <= offset <= len(records):
            raise LogTruncated(f"{topic}/{partition}: offset {offset} is outside 0..{len(records)}: `--accept-gap`")
        found = records[offset : offset + limit]
        return Batch(found, offset + len(found))

    def watch(self, topics: Sequence[str]) -> Watch:
        return AskOften()

    def identity(self, topic: str, partition: int) -> str:
        return self._id

    def begin(self, topic: str, partition: int) -> int:
        return 0

    def end(self, topic: str, partition: int) -> int:
        return len(self._topics[topic])

    def ends(self, places: Sequence[tuple[str, int]]) -> list[int]:
        return [self.end(*place) for place in places]

    def partitions(self, topic: str) -> int:
        return 1

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        return

    def close(self) -> None:
        return
