"""What the trainer reads: where it stands in each partition, what is new, and what log time everything was read up to."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from recsys import metrics
from recsys.clock import Clock, bounded_ms
from recsys.streams.base import EventLog
from recsys.streams.positions import ends as ends_of
from recsys.streams.positions import identities, resume, split
from recsys.streams.ranges import read_range
from recsys.training.journal import log_ms
from recsys.types import Batch, Record

logger = logging.getLogger("recsys")
CONSUMER = "trainer"
TOPICS = ("item", "impression", "feedback")
READ_LIMIT = 1000
"""Records of one partition taken in one step: half makes a backlog slower, double holds a step (and freshness) longer."""

MARK_MS = 100
"""The log's ends are asked for this often, to know what time everything was read up to: half asks twice as much, double holds
labels back for longer."""

ITEMS_FIRST = 1000
"""Every so many batches of nothing but items the rest is read, too: a million items are read within a minute, an endless stream of
them must not hold learning back for ever."""


class Polled(NamedTuple):
    """What one step may be made of; `all_read_ms` 0: it is not known yet."""

    records: list[Record]
    ends: dict[str, int]
    all_read_ms: int
    wall_ms: int


class Intake:
    """Positions in the log, by "topic/partition", and log time. Not thread-safe."""

    def __init__(self, log: EventLog, clock: Clock, leave_off: Callable[[], None] = lambda: None) -> None:
        """`leave_off` is called while a range is waited for; it may raise."""
        self._log, self._clock, self._leave_off = log, clock, leave_off
        self.positions: dict[str, int] = {}
        self.logs: dict[str, str] = {}
        """Which log each position is in."""
        self._marked_ms, self._marks = 0, dict[str, int]()
        """The partitions' ends at one log time; once they are read, nothing before it is still unread."""
        self._read_ms: dict[str, int] = {}
        self._only_items = 0
        """Full batches of items in a row."""

    def begin(self, saved: Mapping[str, int], logs: Mapping[str, str], *, accept_gap: bool = False) -> list[str]:
        """Stand at the saved positions, and at the beginning of every other partition; returns the gaps that were accepted.

        Raises LogTruncated when the log is another one, or lost what comes after a position, unless `accept_gap`.
        """
        self.positions, gaps = resume(self._log, CONSUMER, TOPICS, saved, logs, accept_gap=accept_gap)
        self.logs = identities(self._log, self.positions)
        return gaps

    def passed(self, ends: Mapping[str, int]) -> None:
        """Records up to these ends were taken."""
        self.positions |= {key: max(end, self.positions.get(key, 0)) for key, end in ends.items()}

    def commit(self, positions: Mapping[str, int]) -> None:
        """Tell the log that what lies before these positions is not read again."""
        for key, offset in positions.items():
            self._log.commit(CONSUMER, *split(key), offset)

    def ends(self) -> dict[str, int]:
        """Where each partition ends now."""
        return ends_of(self._log, self.positions)

    def poll(self, until: Mapping[str, int] | None = None) -> Polled:
        """New records (before the ends `until`), the partitions' new ends, and log time: no impression or feedback before it is still
        unread.

        A read that found nothing does not say so: Kafka's client answers before the broker did. Items go first: as long as there may be
        more of them nothing else is read, which would be learned without knowing what it names.
        """
        records: list[Record] = []
        ends: dict[str, int] = {}
        wall_ms = self._clock.now_ms()
        self._mark(wall_ms)
        for key in _ordered(self.positions):
            if until is not None and self.positions[key] >= until.get(key, 0):
                continue
            batch = self._log.read(*split(key), self.positions[key], READ_LIMIT)
            if until is not None and batch.next > until[key]:
                batch = Batch([r for r in batch if r.offset < until[key]], until[key])
            if batch.next > self.positions[key]:
                ends[key] = batch.next
            if batch:
                records += batch
                self._read_ms[key] = max(self._read_ms.get(key, 0), log_ms(batch[-1], wall_ms))
            if key.startswith("item/"):
                self._only_items = self._only_items + 1 if len(batch) >= READ_LIMIT else 0
                if self._only_items % ITEMS_FIRST > 0:
                    break
        for key, end in self._marks.items():
            if ends.get(key, self.positions[key]) >= end:
                self._read_ms[key] = max(self._read_ms.get(key, 0), self._marked_ms)
        return Polled(records, ends, self._all_read_ms(), wall_ms)

    def _all_read_ms(self) -> int:
        return min((self._read_ms.get(key, 0) for key in self._marks), default=0)

    def _mark(self, wall_ms: int) -> None:
        """Ask for the ends again, once those of the last time were read, or the clock was set back."""
        latest_ms = bounded_ms(2**62, wall_ms)
        if self._marked_ms > latest_ms:
            self._marked_ms, self._marks = 0, {}
        self._read_ms = {key: min(time_ms, latest_ms) for key, time_ms in self._read_ms.items()}
        if self._all_read_ms() >= self._marked_ms and (not self._marks or not 0 <= wall_ms - self._marked_ms < MARK_MS):
            timed = [key for key in self.positions if not key.startswith("item/")]
            self._marked_ms, self._marks = wall_ms, ends_of(self._log, timed)

    def again(self, ends: Mapping[str, int]) -> list[Record]:
        """The records from here to these ends, in the order in which `poll` gave them."""
        return [r for key in _ordered(ends) for r in self.range(key, self.positions[key], ends[key])]

    def range(self, key: str, start: int, end: int) -> Iterator[Record]:
        """The records of one partition from `start` to before `end`, all of them."""
        for batch in read_range(self._log, key, start, end, limit=READ_LIMIT, pause=self._pause):
            yield from batch

    def _pause(self, seconds: float) -> None:
        self._leave_off()
        time.sleep(seconds)

    def lag(self) -> dict[tuple[str, int], int]:
        """Records not yet read, by (topic, partition)."""
        return {split(key): max(0, end - self.positions[key]) for key, end in self.ends().items()}


def log_time(before_ms: int, polled: Polled) -> int:
    """Log time after these records: it never goes back, but from more than the bound ahead of the wall clock, which was once wrong,
    or is."""
    latest_ms = bounded_ms(2**62, polled.wall_ms)
    if before_ms <= latest_ms:
        return max(before_ms, polled.all_read_ms)
    metrics.TIME_SET_BACK.inc()
    logger.error(
        "log time was %.0f s ahead of this machine's clock, by a clock that was ahead: it goes on from now",
        (before_ms - polled.wall_ms) / 1000,
    )
    times = [log_ms(record, polled.wall_ms) for record in polled.records]
    return polled.all_read_ms or min(times, default=polled.wall_ms)


def order_of(log: EventLog) -> int | None:
    """The tables' order: the same whoever runs this log's steps again, and nothing that a sender of events could know."""
    name = log.identity("impression", 0)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1 if name else None


def _ordered(keys: Mapping[str, int]) -> list[str]:
    """Items before impressions before feedback, then by partition."""
    return sorted(keys, key=lambda key: (TOPICS.index(split(key)[0]), split(key)[1]))
