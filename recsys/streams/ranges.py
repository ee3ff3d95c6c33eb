"""A range of a log, read whole: nothing came does not mean that there is nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from recsys.errors import LogTruncated, LogUnavailable
from recsys.streams.base import EventLog
from recsys.types import Batch

PATIENCE_S = 60.0
"""Without a step forward for so long, a range is given up with an error: half gives up while a broker elects a leader."""
_PAUSE_S = 0.02


def read_range(
    log: EventLog,
    key: str,
    start: int,
    end: int,
    *,
    limit: int = 1000,
    patience_s: float = PATIENCE_S,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[Batch]:
    """The records of "topic/partition" from `start` to before `end`, batch by batch, all of them.

    An empty read, or a broker that is away, is waited for: LogUnavailable, naming the offset, after `patience_s` without a
    step forward. `pause` waits; it may raise to give up earlier. LogTruncated when the log does not reach `end`.
    """
    topic, partition = key.rsplit("/", 1)
    moved_s = time.monotonic()
    while start < end:
        trouble: Exception | None = None
        try:
            batch = log.read(topic, int(partition), start, limit)
            if batch.next > start:
                start, moved_s = batch.next, time.monotonic()
                if batch and batch[-1].offset >= end:
                    batch = Batch([record for record in batch if record.offset < end], end)
                yield batch
                continue
            if (last := log.end(topic, int(partition))) < end:
                raise LogTruncated(f"{key} ends at {last}, records up to {end} are needed: restore the log")
        except LogUnavailable as error:
            trouble = error
        if time.monotonic() - moved_s > patience_s:
            raise LogUnavailable(
                f"{key}: nothing came from offset {start} on for {patience_s:g} s, though the log reaches {end}: check the broker"
            ) from trouble
        pause(_PAUSE_S)
