"""The event log: the only way state moves between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from recsys.errors import RecordTooLarge
from recsys.types import Batch

MAX_VALUE_BYTES = 2**20
"""Of one record, in every log: what is larger is refused by `append`."""

STUCK_S = 3.0
"""Without a step forward for so long, what is accepted now is not in answers within the five seconds that ready promises. Half would say so
at a slow disk."""
TRANSIENT = ("parameters",)
"""Topics of which a log keeps nothing that its only reader has committed: 18 GB a day otherwise."""


def check_sizes(topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
    """Refuse what no log takes."""
    for key, value in messages:
        if len(value) > MAX_VALUE_BYTES:
            raise RecordTooLarge(
                f"message {key[:100]!r} for {topic!r} has {len(value)} bytes, more than {MAX_VALUE_BYTES}: split it",
                field="value",
            )


class Watch(Protocol):
    """Tells one thread that something may have come to the topics that it follows."""

    @property
    def tells(self) -> bool:
        """Whether it does, but for a few appends: else each wait ends by its time."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return once something was appended, by any process, since the call before returned, or after `timeout_s`; now and then for
        nothing.

        Not every append is told: of a process killed between its commit and the telling, of another host or of an earlier release it
        is not. So who waits reads after each timeout, too.
        """
        ...


class EventLog(Protocol):
    """An ordered, durable log of topics and partitions. Every method is thread-safe.

    A record of one key always goes to the same partition. Offsets of one partition grow but need not be dense.
    """

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        """Append (key, value) pairs in order; blocks until they are accepted: kill -9 can no longer lose them.

        Raises LogFull when nothing more can be accepted, RecordTooLarge when a value has more than MAX_VALUE_BYTES; then
        nothing of this call was accepted.
        A record may appear more than once downstream (an unacknowledged send is repeated): consumers drop duplicates.
        """
        ...

    def flush(self, timeout_s: float = 10.0) -> None:
        """Block until everything accepted so far is readable by every process; LogUnavailable when it is not in time."""
        ...

    def trouble(self) -> str:
        """Why what was accepted does not reach other processes, when it has not for a while; empty when it does."""
        ...

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        """Up to `limit` committed records from `offset` on, at once, and the offset to go on from.

        Nothing found does not mean that there is nothing: a range was read whole when `Batch.next` has reached its end
        (`recsys.streams.ranges.read_range` waits for that).
        Raises LogTruncated when `offset` lies before `begin` (and the log is not empty there) or after `end`, or when the
        topic was made anew since this process first used it; LogUnavailable when the broker cannot be reached.
        """
        ...

    def watch(self, topics: Sequence[str]) -> Watch:
        """Tells when to read these topics again; creates them when they are new. For one thread."""
        ...

    def identity(self, topic: str, partition: int) -> str:
        """Which log this is: another one after the topic was deleted and made anew. Saved beside every position in it.

        It is the one that this process found first: if it changes meanwhile, `read` raises LogTruncated. "" where the broker
        has none (before Kafka 2.8).
        """
        ...

    def begin(self, topic: str, partition: int) -> int:
        """The first offset that can still be read (= `end` when empty)."""
        ...

    def end(self, topic: str, partition: int) -> int:
        """The offset that the next committed record will be at or after; what reads up to here knows all that is committed."""
        ...

    def ends(self, places: Sequence[tuple[str, int]]) -> list[int]:
        """The `end` of each (topic, partition), asked for together: on Kafka one question to the brokers instead of one each."""
        ...

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; creates the topic with the configured number when it is new."""
        ...

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Tell lag displays and retention how far `group` is. Never read back for correctness.

        What comes before it in a topic of `TRANSIENT` is dropped.
        """
        ...

    def close(self) -> None:
        """Send what is accepted, if it can be sent now, and release everything. Idempotent."""
        ...
