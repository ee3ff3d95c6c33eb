"""The event log: the only way state moves between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from recsys.types import Record


class EventLog(Protocol):
    """An ordered, durable log of topics and partitions. Every method is thread-safe.

    A record of one key always goes to the same partition. Offsets of one partition grow but need not be dense.
    """

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        """Append (key, value) pairs in order; blocks until they are accepted: kill -9 can no longer lose them.

        Raises LogFull when nothing more can be accepted; then nothing of this call was accepted.
        A record may appear more than once downstream (an unacknowledged send is repeated): consumers drop duplicates.
        """
        ...

    def flush(self, timeout_s: float = 10.0) -> None:
        """Block until everything accepted so far is readable by every process; LogUnavailable when it is not in time."""
        ...

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> list[Record]:
        """Up to `limit` records from `offset` on, at once: an empty list when there are none yet.

        Raises LogTruncated when `offset` lies before `begin` (and the log is not empty there) or after `end`,
        LogUnavailable when the broker cannot be reached.
        """
        ...

    def begin(self, topic: str, partition: int) -> int:
        """The first offset that can still be read (= `end` when empty)."""
        ...

    def end(self, topic: str, partition: int) -> int:
        """The offset that the next record will be at or after."""
        ...

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; creates the topic with the configured number when it is new."""
        ...

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Tell lag displays and retention how far `group` is. Never read back for correctness."""
        ...

    def close(self) -> None:
        """Send what is accepted, if it can be sent now, and release everything. Idempotent."""
        ...
