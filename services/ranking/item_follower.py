"""Topic `item` into the catalogue, and the catalogue into its file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from recsys import metrics
from recsys.candidates.sources import Sources
from recsys.clock import Clock
from recsys.errors import BadInput, CatalogueFull, LogUnavailable
from recsys.events import messages
from recsys.features.schema import Schema
from recsys.ranking import catalogue_file
from recsys.streams import positions
from recsys.streams.base import EventLog
from recsys.types import Record
from services.common.process import Stop, logger

FREE_S = 0.1
"""Where nothing comes: rows of deleted items rest for some time before they are free."""
CATALOGUE_S = 3600.0
"""The catalogue is saved at least this often when anything in it changed: its file must not grow older than twelve hours."""


class ItemFollower:
    """Reads the topic from the file's positions on. `load` and `turn` belong to one thread, `save` to one; anybody may `settle`."""

    def __init__(
        self,
        log: EventLog,
        clock: Clock,
        sources: Sources,
        schema: Schema,
        folder: Path,
        changed: Callable[[int], None],
    ) -> None:
        """`changed` is told of each row whose item came."""
        self._log, self._clock, self._sources, self._schema = log, clock, sources, schema
        self._folder, self._changed = folder, changed
        self._positions = {p: log.begin("item", p) for p in range(log.partitions("item"))}
        self._ends: dict[int, int] = {}
        """Of what there was at the start: once it is read, the catalogue is ready."""
        self.ready = False
        self._saved: dict[int, int] = {}
        self._changes_saved = 0
        self._saved_s = self._freed_s = 0.0

    def load(self, *, accept_gap: bool) -> None:
        """What the file holds; without one the topic is read from its beginning. LogTruncated: see `positions.resume`."""
        saved, logs = catalogue_file.saved_positions(self._folder)
        resumed = positions.resume(self._log, "catalogue", ("item",), saved, logs, accept_gap=accept_gap)
        if resumed.gaps:
            logger.error("the catalogue is what the log holds now: send the other items again (`recsys import items`)")
            return
        now_ms, bounds = self._clock.now_ms(), {}
        for partition in self._positions:
            bounds[partition] = self._log.begin("item", partition), self._log.end("item", partition)
        found = catalogue_file.load(self._folder, self._sources, self._schema, bounds, now_ms)
        if found is not None:
            self._positions.update(found)
            self._saved, self._changes_saved = found, self._sources.catalogue.num_changes
            logger.info("catalogue of %d items restored", self._sources.catalogue.num_alive)

    def turn(self) -> bool:
        """Apply what is new; whether there was anything."""
        worked = False
        for partition, position in self._positions.items():
            if not self.ready and partition not in self._ends:
                self._ends[partition] = self._log.end("item", partition)
            records = self._log.read("item", partition, position, 5000)
            refused: list[str] = []
            for record in records:
                try:
                    self._changed(self._sources.item(messages.parse_item(record.value, key=record.key)))
                except CatalogueFull as error:
                    refused.append(str(error))
                except BadInput as error:
                    skipped(record, str(error))
            if refused:
                metrics.CATALOGUE_REFUSED.inc(len(refused))
                logger.error("%d new items of topic item are not in the catalogue: %s", len(refused), refused[-1])
            self._positions[partition] = records.next
            worked |= records.next > position
        if worked or self._clock.monotonic_s() - self._freed_s > FREE_S:
            self._freed_s = self._clock.monotonic_s()
            self._sources.free_rows()
            metrics.CATALOGUE_ITEMS.set(self._sources.catalogue.num_alive)
            metrics.CATALOGUE_FULL.set(self._sources.catalogue.full_ratio)
        self.ready |= all(self._positions[p] >= end for p, end in self._ends.items())
        return worked

    def settle(self, stop: Stop, timeout_s: float) -> None:
        """Until the catalogue holds all that was written before this call. Raises LogError when it does not in time."""
        deadline = time.monotonic() + timeout_s
        self._log.flush(timeout_s)
        ends = {partition: self._log.end("item", partition) for partition in self._positions}
        while any(self._positions[partition] < end for partition, end in ends.items()):
            if time.monotonic() > deadline or stop.wait(0.001):
                raise LogUnavailable(
                    f"the catalogue is more than {timeout_s:g} s behind its log: try again when /readyz says ready"
                )

    def save(self) -> None:
        """When a hundredth of it changed, or anything did and the file is old: writing a million items takes a second of one core."""
        read, now_s = dict(self._positions), self._clock.monotonic_s()
        changed = self._sources.catalogue.num_changes  # by rows that were given up, too
        records = sum(read.values()) - sum(self._saved.get(p, 0) for p in read)
        changes = max(records, changed - self._changes_saved)
        many = changes > self._sources.catalogue.num_alive / 100
        if self.ready and changes and (many or now_s - self._saved_s > CATALOGUE_S):
            logs = positions.identities(self._log, (f"item/{partition}" for partition in read))
            catalogue_file.save(self._folder, self._sources, self._schema, read, logs, self._clock.now_ms())
            self._saved, self._changes_saved, self._saved_s = read, changed, now_s


def skipped(record: Record, reason: str) -> None:
    """Count and say a record that is no message of its topic."""
    metrics.DEAD_LETTERS.labels(record.topic, "malformed").inc()
    logger.warning("%s/%d/%d skipped: %s", record.topic, record.partition, record.offset, reason)
