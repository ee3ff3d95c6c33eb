"""The parameter service: deltas in, rows out, snapshots between."""

from __future__ import annotations

import time

from recsys import metrics
from recsys.clock import Clock, SystemClock
from recsys.config import Config
from recsys.errors import BadInput, LogTruncated, LogUnavailable, SchemaMismatch, SnapshotCorrupt
from recsys.events.deltas import DeltaReader
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.ranking.parameters import ParameterStore
from recsys.streams.base import EventLog
from recsys.streams.open import open_log
from recsys.table.tables import placed
from services.common import grpc_parameters
from services.common.process import FolderLock, HealthServer, Stop, logger

TOPIC, CONSUMER = "parameters", "parameter"


class ParameterService:
    """Follows topic `parameters` from its snapshot's position and serves lookups meanwhile."""

    def __init__(self, config: Config, log: EventLog, clock: Clock) -> None:
        self._config, self._log, self._clock = config, log, clock
        self.schema = Schema.of(config)
        self._device = placed(config.parameter.device, config.table.implementation)
        metrics.PARAMETER_DEVICE_INFO.labels(self._device).set(1)
        self.store = self._empty_store()
        self._folder = config.data_dir / "parameter"
        self._reader = DeltaReader()
        self._position = 0
        self._whole = 0
        """Position after the last whole delta: where a snapshot says to go on."""
        self._saved = clock.monotonic_s()
        self._saved_at = -1
        self._counted = (0, 0)
        self.caught_up = False

    def start(self) -> None:
        """Load the snapshot and find the position to go on from; what cannot be used is said loudly and read from the log."""
        position: int | None = None
        try:
            position = self.store.load(self._folder)
        except (SnapshotCorrupt, SchemaMismatch) as error:
            logger.error("snapshot not used: %s; reading the whole log instead", error)
            self.store = self._empty_store()
        begin, end = self._log.begin(TOPIC, 0), self._log.end(TOPIC, 0)
        if position is None or not begin <= position <= end:
            if position is not None:
                logger.error(
                    "snapshot position %d is not in the log (%d to %d): reading all that is left", position, begin, end
                )
            position = begin
        self._position = self._whole = position

    def _empty_store(self) -> ParameterStore:
        return ParameterStore(layouts(self._config, self.schema), self.schema.hash, self._device)

    def turn(self) -> int:
        """Apply what is new; returns how many messages were read."""
        try:
            records = self._log.read(TOPIC, 0, self._position, 200)
        except LogTruncated as error:
            logger.error("%s: going on from what is left; rows not published since stay as they are", error)
            self._position = self._log.begin(TOPIC, 0)
            return 0
        for record in records:
            self._position = record.offset + 1
            try:
                delta = self._reader.feed(record.value)
                if delta is None:
                    continue
                applied = self.store.apply(delta)
            except (BadInput, SchemaMismatch) as error:
                metrics.DEAD_LETTERS.labels(TOPIC, "schema" if isinstance(error, SchemaMismatch) else "malformed").inc()
                logger.error("parameters offset %d not used: %s", record.offset, error)
                continue
            self._whole = record.offset + 1
            if applied:
                metrics.DELTAS_APPLIED.inc()
                metrics.PARAMETER_VERSION_STEP.set(delta.version.step)
                metrics.FRESHNESS_SECONDS.labels("parameters").observe(
                    max(0, self._clock.now_ms() - delta.covers_ms) / 1000
                )
        self.caught_up = self.caught_up or not records
        return len(records)

    def _save(self) -> None:
        try:
            with metrics.SNAPSHOT_SECONDS.time():
                self.store.save(self._folder, self._whole)
        except OSError as error:
            logger.error("no snapshot (%s): the previous one stays, and more of the log is read after a restart", error)
            return
        self._saved_at = self._whole
        self._log.commit(CONSUMER, TOPIC, 0, self._whole)

    def maintain(self, *, force: bool = False) -> None:
        """Snapshot when due; gauges."""
        now_s = self._clock.monotonic_s()
        if force or now_s - self._saved >= self._config.parameter.snapshot_s:
            self._saved = now_s
            if self._whole != self._saved_at:
                self._save()
        for layout, table in self.store.tables.items():
            metrics.TABLE_ROWS.labels(layout).set(len(table))
            metrics.TABLE_BYTES.labels(layout).set(table.memory_bytes())
        metrics.TABLE_FOUND_KEYS.inc(self.store.found - self._counted[0])
        metrics.TABLE_MISSING_KEYS.inc(self.store.missing - self._counted[1])
        self._counted = self.store.found, self.store.missing
        metrics.CONSUMER_LAG.labels(TOPIC, "0", CONSUMER).set(max(0, self._log.end(TOPIC, 0) - self._position))


def run(config: Config, stop: Stop) -> None:
    """Serve until SIGTERM."""
    lock = FolderLock(config.data_dir, "parameter")
    log = open_log(config, SystemClock(), "parameter")
    service = ParameterService(config, log, SystemClock())
    health = HealthServer(
        config.ranking.host, config.parameter.metrics_port, lambda: "" if service.caught_up else "reading the log"
    )
    service.start()
    server = grpc_parameters.serve(service.store, config.parameter_address, service.schema.hash)
    logger.info(
        "parameter service on %s, %d rows", config.parameter_address, sum(len(t) for t in service.store.tables.values())
    )
    maintained = 0.0
    try:
        while not stop:
            try:
                worked = service.turn()
                if time.monotonic() - maintained > 1.0:
                    service.maintain()
                    maintained = time.monotonic()
            except LogUnavailable as error:
                logger.warning("%s", error)
                worked = 0
                stop.wait(0.5)
            metrics.READY.set(service.caught_up)
            if not worked:
                stop.wait(0.005)
    finally:
        server.stop(grace=1.0).wait()
        service.maintain(force=True)
        health.close()
        log.close()
        lock.release()
