"""The parameter service: deltas in, rows out, snapshots between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

import orjson

from recsys import metrics
from recsys.clock import Clock, SystemClock, bounded_ms
from recsys.config import Config
from recsys.errors import BadInput, LogError, LogTruncated, SchemaMismatch
from recsys.events.dead_letters import letter
from recsys.features.schema import Schema
from recsys.model.layouts import layouts, parameters_name, sizes
from recsys.parameters import grpc_parameters
from recsys.parameters.arena import Sharing
from recsys.parameters.deltas import WHOLE_BEGIN, DeltaReader
from recsys.parameters.parameter_files import Place, Snapshots, load_checkpoint
from recsys.parameters.store import ParameterStore
from recsys.streams.base import STUCK_S, EventLog
from recsys.streams.open_log import open_log
from recsys.streams.positions import gap_of, resume
from recsys.table.tables import placed
from recsys.types import Record
from services.common.process import FolderLock, HealthServer, Stop, logger
from services.common.rest import Rest
from services.common.table_gauges import TableGauges
from services.parameter.saving import Saving

TOPIC, CONSUMER = "parameters", "parameter"
KEY = f"{TOPIC}/0"
SOME, IGNORED_S = 20, 5.0
"""So many deltas in a row, over so many seconds, that are not applied: two seconds of a trainer's."""


class ParameterService:
    """Follows topic `parameters` from its snapshot's position and serves lookups meanwhile."""

    def __init__(self, config: Config, log: EventLog, clock: Clock) -> None:
        self._config, self._log, self._clock = config, log, clock
        self.schema = Schema.of(config)
        self._device = placed(config.parameter.device, config.table.implementation)
        metrics.PARAMETER_DEVICE_INFO.labels(self._device).set(1)
        self.name = parameters_name(config, self.schema)
        folder = config.data_dir / "parameter"
        self._sharing = Sharing(folder, self.name) if self._device == "cpu" else None
        self.store = ParameterStore(layouts(config, self.schema), self.name, self._device, self._sharing)
        self._snapshots = Snapshots(folder, self.name)
        self._outgrown = False
        """The last snapshot was of another configuration: only the trainer has rows of this one."""
        self._reader = DeltaReader()
        self._position = 0
        self._whole_at = 0
        """Where the whole state that is coming begins."""
        self._gap = ""
        self._after_gap = False
        self._ignored = Ignored()
        self._read_s = clock.monotonic_s()
        self._saving = Saving(self._snapshots, config.parameter.snapshot_s, self._read_s)
        self._counted = (0, 0)
        self._tables = TableGauges()
        self._goal: int | None = None
        """Where the log ended when this began: once that was read, the service has caught up, whatever came since."""
        self.caught_up = False

    def start(self, *, accept_gap: bool = False) -> None:
        """Load the newest snapshot that is whole and find where to go on; what is missing is said and read from elsewhere.

        Deltas that are missing and that the trainer's checkpoint does not make up for are a gap: unless it is accepted, the rows
        of the snapshot are served, nothing is read, and this service is not ready.
        """
        place: Place | None = None
        try:
            place = self._snapshots.load(self.store)
        except SchemaMismatch as error:
            logger.warning("snapshot not used: %s", error)
            self._outgrown, place = True, self._snapshots.left
        saved = {} if place is None else {KEY: place.position}
        logs = {KEY: place.log} if place is not None and place.log else {}
        resumed = resume(self._log, CONSUMER, (TOPIC,), saved, logs, accept_gap=True)
        self._position = resumed.positions[KEY]
        missing = resumed.gaps or (place is None and self._position > 0)
        if self._outgrown and load_checkpoint(self.store, self._config.data_dir / "trainer", self.name) is not None:
            self._after_gap = True
        elif missing and not self._bridge_gap() and resumed.gaps and not accept_gap:
            self._gap = str(gap_of(CONSUMER, resumed.gaps))
            logger.error("%s", self._gap)
        self._goal, self._read_s = self._log.end(TOPIC, 0), self._clock.monotonic_s()
        self.store.share()

    def close(self) -> None:
        """Share nothing any more."""
        if self._sharing is not None:
            self._sharing.close()

    def _bridge_gap(self) -> bool:
        """Deltas are missing: what the trainer's newest checkpoint holds, then what the log still has. False without one."""
        self._after_gap = True
        folder = self._config.data_dir / "trainer"
        step = load_checkpoint(self.store, folder, self.name)
        metrics.PARAMETER_GAPS.labels("log" if step is None else "checkpoint").inc()
        if step is None:
            logger.error(
                "deltas before offset %d are gone, and %s holds no checkpoint to use: rows that were not published since are served as "
                "they were last known here; restart this service with a copy of the trainer's folder there",
                self._position,
                folder,
            )
            return False
        self._snapshots.begin_anew(self.store)
        logger.error(
            "deltas before offset %d are gone: rows are from the trainer's checkpoint, step %d", self._position, step
        )
        return True

    def rest(self, stop: Stop) -> Rest:
        """The pauses of who takes turns."""
        return Rest(self._log.watch((TOPIC,)), stop)

    def turn(self) -> int:
        """Apply what is new; returns how many messages were read."""
        if self._sharing is not None:
            self._sharing.beat()
        if self._gap:
            return 0
        try:
            self._notice_pause()
            records = self._log.read(TOPIC, 0, self._position, 200)
        except LogTruncated as error:
            logger.error("%s", error)
            try:
                self._position = self._log.begin(TOPIC, 0)
            except LogTruncated as gap:  # the log was made anew: the next start knows what to do
                self._gap = str(gap)
                return 0
            self._bridge_gap()
            return 0
        self._read_s = self._clock.monotonic_s()
        letters = [letter(record, reason) for record in records if (reason := self._take(record))]
        self._position = records.next
        if letters:
            self._bury(letters)
        if not self.caught_up:
            self.caught_up = self._position >= (self._goal or 0)
        return len(records)

    def _notice_pause(self) -> None:
        """It was frozen, or the log was away: what came meanwhile is read before it is ready again."""
        if self.caught_up and self._clock.monotonic_s() - self._read_s > STUCK_S:
            self._goal, self.caught_up = self._log.end(TOPIC, 0), False

    def _take(self, record: Record) -> str:
        """Apply one message; why it is a dead letter, or nothing."""
        begun = self._reader.begins()
        try:
            delta = self._reader.feed(record.value, record.offset)
            if delta is None:
                return ""
            delta = replace(delta, covers_ms=bounded_ms(delta.covers_ms, self._clock.now_ms()))
            applied = self.store.apply(delta, after_gap=self._after_gap)
        except BadInput as error:
            metrics.DEAD_LETTERS.labels(TOPIC, "malformed").inc()
            return str(error)
        except SchemaMismatch as error:
            # Of another configuration: thousands of them may follow each other, and none is wrong.
            metrics.DEAD_LETTERS.labels(TOPIC, "schema").inc()
            if self._waits_for_trainer:
                return ""
            self._ignored.add(str(error), self._clock.monotonic_s())
            return ""
        if not applied:
            metrics.DELTAS_IGNORED.inc()
            newest = self.store.state.version
            why = f"deltas of {delta.version} are ignored, for {newest} came before: restart the trainer, it begins a newer epoch"
            self._ignored.add(why, self._clock.monotonic_s())
            return ""
        self._after_gap = False
        self._ignored = Ignored()
        if delta.whole == WHOLE_BEGIN:
            self._whole_at = record.offset if begun is None else begun
        metrics.DELTAS_APPLIED.inc()
        metrics.PARAMETER_VERSION_STEP.set(delta.version.step)
        metrics.FRESHNESS_SECONDS.labels("parameters").observe(max(0, self._clock.now_ms() - delta.covers_ms) / 1000)
        return ""

    def _bury(self, letters: list[tuple[str, bytes]]) -> None:
        key, value = letters[0]
        logger.error("%d messages not used, the first %s: %s", len(letters), key, orjson.loads(value)["reason"])
        try:
            self._log.append("dead_letter", letters)
        except LogError as error:
            logger.warning(
                "%d dead letters not kept (%s): the messages are still in topic %s", len(letters), error, TOPIC
            )

    def not_ready(self) -> str:
        """Why what is served is not what the trainer publishes; empty when it is."""
        now_s = self._clock.monotonic_s()
        if self._gap:
            return self._gap
        if self._goal is None:
            return "reading the snapshot"
        if self._waits_for_trainer:
            return "rows of another configuration are not served: the trainer publishes all of them once it has carried them over"
        if now_s - self._read_s > STUCK_S:
            return f"topic {TOPIC} could not be read for {now_s - self._read_s:.0f} s: see the log of this process"
        if trouble := self._log.trouble():
            return trouble
        return self._ignored.reason(now_s) or ("" if self.caught_up else "reading the log")

    @property
    def _waits_for_trainer(self) -> bool:
        """Whether nothing is known yet under this configuration; dense weights come behind all rows."""
        return self._outgrown and not self.store.state.dense_version

    def _save(self) -> None:
        if self._gap or self._waits_for_trainer:
            return
        begins = [self._reader.begins(), self._whole_at if self.store.receiving else None]
        position = min([self._position, *(at for at in begins if at is not None)])
        if needed := self._saving.save(self.store, Place(position, self._log.identity(TOPIC, 0))):
            self._log.commit(CONSUMER, TOPIC, 0, needed.position)

    def maintain(self, *, force: bool = False) -> None:
        """Snapshot when due; gauges."""
        if self._saving.due(self._clock.monotonic_s(), force=force):
            self._save()
        self._tables.show(self.store.tables)
        metrics.TABLE_FOUND_KEYS.inc(self.store.found - self._counted[0])
        metrics.TABLE_MISSING_KEYS.inc(self.store.missing - self._counted[1])
        self._counted = self.store.found, self.store.missing
        metrics.CONSUMER_LAG.labels(TOPIC, "0", CONSUMER).set(max(0, self._log.end(TOPIC, 0) - self._position))


class Ignored:
    """Deltas that are not applied, one after the other: some follow a restart; when no other ones come, somebody must know."""

    def __init__(self) -> None:
        self._count, self._since_s, self._why = 0, 0.0, ""

    def add(self, why: str, now_s: float) -> None:
        """One more that was not applied."""
        self._since_s = self._since_s if self._count else now_s
        self._count, self._why = self._count + 1, why
        if self._count in (1, SOME) or self._count % 1000 == 0:
            logger.error("%d deltas in a row not applied: %s", self._count, why)

    def reason(self, now_s: float) -> str:
        """Why nothing is applied; empty while it may be a restart."""
        return self._why if self._count >= SOME and now_s - self._since_s > IGNORED_S else ""


def run(config: Config, stop: Stop, *, accept_gap: bool = False) -> None:
    """Serve until SIGTERM. `accept_gap`: go on although the log lost deltas that come after the snapshot."""
    with contextlib.ExitStack() as held:
        held.callback(FolderLock(config.data_dir, "parameter").release)
        log = open_log(config, SystemClock(), "parameter")
        held.callback(log.close)
        service = ParameterService(config, log, SystemClock())
        held.callback(service.close)
        held.callback(HealthServer(config.ranking.host, config.parameter.metrics_port, service.not_ready).close)
        while not _tried(lambda: service.start(accept_gap=accept_gap), stop):
            if stop:
                return
        server = grpc_parameters.serve(service.store, config.parameter_address, service.name)
        rows = service.store.tables.num_rows()
        logger.info("parameter service on %s, %d rows", config.parameter_address, rows)
        logger.info("tables have room for %s", sizes(table.layout for table in service.store.tables.values()))
        try:
            _follow(service, stop)
        finally:
            server.stop(grace=1.0).wait()
            _tried(lambda: service.maintain(force=True), stop)


def _follow(service: ParameterService, stop: Stop) -> None:
    maintained, worked, rest = 0.0, 0, service.rest(stop)

    def turn() -> None:
        nonlocal worked
        worked = service.turn()

    while not stop:
        worked = 0
        _tried(turn, stop)
        if time.monotonic() - maintained > 1.0:
            maintained = time.monotonic()
            _tried(service.maintain, stop)
        metrics.READY.set(not service.not_ready())
        if not rest.found(bool(worked)):
            rest()


def _tried(call: Callable[[], object], stop: Stop) -> bool:
    """Whether it was done; a broker that is away or a disk that is full is said, and tried again later."""
    try:
        call()
    except (LogError, OSError) as error:
        logger.warning("%s", error)
        stop.wait(0.5)
        return False
    return True
