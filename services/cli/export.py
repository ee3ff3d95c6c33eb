"""`recsys log export`: a system's own log as event files."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recsys import config
from recsys.clock import SystemClock, iso_ms
from recsys.errors import BadInput, LogTruncated, LogUnavailable
from recsys.events import event_files, messages
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.types import FORGET, Feedback, Impression, Item, Record
from services.cli.main import DONE, emit

BATCH = 1000
_WAIT_S = 10.0
"""Records that are known to be there come within this time, or the log is called unavailable."""


class Export:
    """Reads a log once, from its beginning to the end it had at the start; `counts` says what was left out, and why."""

    def __init__(self, log: EventLog, from_ms: float, to_ms: float, progress: Callable[[int], None]) -> None:
        self._log, self._from_ms, self._to_ms, self._progress = log, from_ms, to_ms, progress
        self._bounds = {
            (topic, partition): (log.begin(topic, partition), log.end(topic, partition))
            for topic in ("item", "impression", "feedback")
            for partition in range(log.partitions(topic))
        }
        self.num_records = sum(end - begin for begin, end in self._bounds.values())
        self._done = 0
        self.counts: Counter[str] = Counter(forget=0, undecodable=0, deleted_items=0)

    def items(self) -> Iterator[Item]:
        """Every version of each item, oldest first. A replay has all items from its start on, so a later delete is left out:
        what was deleted within the time exported was there to be shown."""
        for record in self._records("item", 0):
            with self._decoding():
                item = messages.parse_item(record.value, key=record.key)
                if item.deleted and record.time_ms >= self._from_ms:
                    self.counts["deleted_items"] += 1
                else:
                    yield item

    def impressions(self) -> Iterator[Impression]:
        """As logged, at log time."""
        for record in self._records("impression", self._from_ms):
            with self._decoding():
                yield replace(messages.parse_impression(record.value), time_ms=record.time_ms)

    def feedback(self) -> Iterator[Feedback]:
        """As logged, at log time, without the messages that forget a user."""
        for record in self._records("feedback", self._from_ms):
            with self._decoding():
                event = messages.parse_feedback(record.value, internal=True)
                if event.type == FORGET:
                    self.counts["forget"] += 1
                else:
                    yield replace(event, time_ms=record.time_ms)

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except BadInput:
            self.counts["undecodable"] += 1

    def _records(self, topic: str, from_ms: float) -> Iterator[Record]:
        """The records of all partitions by log time, which never goes back (a broker's clock may, by a little)."""
        partitions = [self._partition(*place) for place in self._bounds if place[0] == topic]
        last_ms = 0
        for record in heapq.merge(*partitions, key=attrgetter("time_ms")):
            last_ms = max(last_ms, record.time_ms)
            if from_ms <= last_ms < self._to_ms:
                yield replace(record, time_ms=last_ms)

    def _partition(self, topic: str, partition: int) -> Iterator[Record]:
        offset, end = self._bounds[topic, partition]
        deadline = time.monotonic() + _WAIT_S
        while offset < end:
            try:
                records = self._log.read(topic, partition, offset, BATCH)
            except LogTruncated:  # retention of a running system cut the beginning off
                if (begin := self._log.begin(topic, partition)) <= offset:
                    raise
                offset = begin
                continue
            if records.next > offset:
                deadline = time.monotonic() + _WAIT_S
                offset = records.next
                self._done += len(records)
                self._progress(self._done)
                yield from (record for record in records if record.offset < end)
            elif time.monotonic() > deadline:
                raise LogUnavailable(f"{topic}/{partition}: nothing to read at {offset} of {end}: check the broker")


def _bound(text: str | None, name: str, default: float) -> float:
    if text is None:
        return default
    return iso_ms(text, name)


def run(options: argparse.Namespace) -> int:
    """Export with progress on stderr; the counts on stdout."""
    loaded = config.load(options.config)
    from_ms, to_ms = _bound(options.from_time, "--from", 0), _bound(options.to_time, "--to", math.inf)
    if from_ms >= to_ms:
        raise BadInput(f"--from {options.from_time} is not before --to {options.to_time}: swap them", field="from")
    folder = loaded.data_dir / "log"
    if loaded.log.kind == "sqlite" and not folder.is_dir():
        raise BadInput(f"{str(folder)!r} does not exist: no system ran with this data_dir; check --config", field="log")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        contextlib.closing(open_log(loaded, SystemClock(), "export")) as log,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        task = bar.add_task("records")
        export = Export(log, from_ms, to_ms, lambda done: bar.update(task, completed=done))
        bar.update(task, total=export.num_records)
        written = event_files.write_events(options.out, export.items(), export.impressions(), export.feedback())
    result: dict[str, Any] = {**written, **export.counts}
    emit(options, result)
    return DONE
