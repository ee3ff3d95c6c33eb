"""The ranking process's parts and threads: catalogue, state consumer, dense weights, generations, snapshots."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from recsys import metrics
from recsys.candidates import recent_users, snapshot
from recsys.candidates.explorer import Bandit
from recsys.candidates.generation import Generations
from recsys.candidates.sources import Sources
from recsys.candidates.state_consumer import TOPICS as STATE_TOPICS
from recsys.candidates.state_consumer import StateConsumer
from recsys.capacity import bound_bytes
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import (
    BadInput,
    CatalogueFull,
    LogError,
    LogTruncated,
    LogUnavailable,
)
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import fused, scoring
from recsys.model.layouts import parameters_name
from recsys.parameters.base import Parameters
from recsys.parameters.grpc_parameters import GrpcParameters
from recsys.parameters.shared_rows import SharedParameters
from recsys.ranking import catalogue_file
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.shown import Shown
from recsys.state.cache import UserCache
from recsys.state.open_state import open_state
from recsys.streams import positions
from recsys.streams.base import EventLog
from recsys.types import AsOf, Feedback, Record, UserState
from services.common.process import Stop, logger
from services.common.rest import NET_S, Rest
from services.common.trouble import Troubles
from services.ranking.builder import Builder
from services.ranking.feedback_intake import Intake
from services.ranking.loops import Idle, Loops
from services.ranking.parse import Refused

POLL_S = 0.005
"""Whether the catalogue was read is looked at this often."""
FREE_S = 0.1
"""Where nothing comes: rows of deleted items rest for some time before they are free."""
CONSUMER = "state"
COMPILE_AFTER_S = 3.0
"""Requests are scored op by op for this long: a trainer beside this process compiles first, and what it compiled is read from the cache."""
SNAPSHOT_S = 60.0
"""Counters are saved this often; what came after is read again from the log."""
CATALOGUE_S = 3600.0
"""The catalogue is saved at least this often when anything in it changed: its file must not grow older than twelve hours."""


class RankingService:
    """Everything behind the HTTP routes. Methods are thread-safe."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        clock: Clock,
        stop: Stop,
        parameters: Parameters | None = None,
        *,
        accept_gap: bool = False,
    ) -> None:
        self.config, self.log, self.clock, self._stop = config, log, clock, stop
        self._accept_gap = accept_gap
        self.schema = Schema.of(config)
        self._users = UserCache(bound_bytes(config.capacity.memory_bytes, "users"))
        self.store = open_state(config, self._users)
        self._channel: GrpcParameters | None = None
        if parameters is None:
            name = parameters_name(config, self.schema)
            self._channel = GrpcParameters(config.parameter_address, name)
            parameters = SharedParameters(config.data_dir / "parameter", name, self._channel)
        self.sources = Sources(
            config, self.schema, Catalogue(self.schema, bound_bytes(config.capacity.memory_bytes, "catalogue"))
        )
        self.scorer = Scorer(config, self.schema, parameters)
        self.bandit = Bandit(config, self.sources.catalogue, self.scorer) if config.explores else None
        # A name tells the space of its vectors: no other process, nor this one after a restart, may give it again.
        prefix = f"g{clock.now_ms():x}-"
        self.generations = Generations(config, self.sources.catalogue, self.scorer, prefix, self.bandit)
        self.sources.on_counted = self.generations.touched
        if self.bandit is not None:
            self.sources.events.on_forgotten = self.bandit.forget
            self.sources.catalogue.on_free.append(self.bandit.forget_rows)
        self._folder = config.data_dir / "ranking"
        self._builder = Builder(config, self._folder / "generations")
        self.pipeline = Pipeline(
            config, self.schema, self.store, self.sources, self.scorer, self.generations, self.bandit
        )
        self.consumer = StateConsumer(config, log, clock, self.store, self.sources, self._on_bad)
        self._item_positions = {p: log.begin("item", p) for p in range(log.partitions("item"))}
        self._item_ends: dict[int, int] = {}
        """Of what there was at the start: once it is read, the catalogue is ready."""
        self._catalogue_saved: dict[int, int] = {}
        self._changes_saved = 0
        self._catalogue_saved_s = self._freed_s = 0.0
        self.intake = Intake(config, log, clock, self.sources, lambda: self.catalogue_ready and self.state_ready)
        self.consumer.on_feedback = self.intake.heard
        self.patching = threading.Lock()
        """Held from reading items to appending their changes, so that two patches of one item both count."""
        self._trouble = Troubles()
        self._idle, self._loops = Idle(stop), Loops(stop, self._trouble)
        self.catalogue_ready = False
        self.state_ready = False
        self.on_caught_up: Callable[[], object] = lambda: None
        """Called when catalogue, counters and state are in memory, before it is ready."""

    def start(self) -> None:
        """Read the catalogue, restore the counters, then follow everything in threads."""
        try:
            self._load_catalogue()
            items = Rest(self.log.watch(("item",)), self._stop)
            self._loops.run("items", lambda: items.found(self._follow_items()), items)
            while not self.catalogue_ready:
                if self._stop.wait(POLL_S):
                    return
            self._load_counters()
            events = Rest(self.log.watch(STATE_TOPICS), self._stop)
            self._loops.run(
                "state",
                lambda: events.found(self._follow_state()) and self.consumer.behind,
                lambda: events(self.consumer.rest_s(NET_S)),
            )
            self._loops.run("snapshot", self.save, self._loops.seconds(SNAPSHOT_S))
        except LogTruncated as gap:  # answers go on from what is there; nothing is read or saved until somebody decides
            logger.error("%s", gap)
            self._trouble.note("start", gap)
        self._loops.run("dense", self._follow_dense, self._idle.pause(0.2, lambda: not self.scorer.dense_version))
        self._loops.run("generations", self._build_generation, self._idle.pause(0.1, lambda: self._building))
        if not self._stop.wait(COMPILE_AFTER_S):
            try:
                fused.warm_up()
                scoring.warm_up()
            except OSError as error:  # the disk of the compiler's cache is full
                logger.error("operations run one by one, slower: what was compiled cannot be kept (%s)", error)

    def restore(self) -> None:
        """What `start` reads, without its threads: whoever calls this calls `turn` and `save` from then on."""
        self._load_catalogue()
        while not self.catalogue_ready:
            self._follow_items()
        self._load_counters()

    def turn(self) -> bool:
        """One turn of what the threads of `start` do, the building of generations left out; whether there was anything to do."""
        worked = [self._follow_items(), self._follow_state()]
        self._follow_dense()
        self._refresh_generation()
        return any(worked)

    def _load_counters(self) -> None:
        snapshot.load(self._folder, self.sources, self.consumer, self.schema, self.clock.now_ms())
        self.consumer.resume(accept_gap=self._accept_gap)
        if self.bandit is not None:
            self.bandit.recent.extend(recent_users.load(self._folder, self.schema))

    def _load_catalogue(self) -> None:
        saved, logs = catalogue_file.saved_positions(self._folder)
        resumed = positions.resume(self.log, "catalogue", ("item",), saved, logs, accept_gap=self._accept_gap)
        if resumed.gaps:
            logger.error("the catalogue is what the log holds now: send the other items again (`recsys import items`)")
            return
        now_ms, bounds = self.clock.now_ms(), {}
        for partition in self._item_positions:
            bounds[partition] = self.log.begin("item", partition), self.log.end("item", partition)
        found = catalogue_file.load(self._folder, self.sources, self.schema, bounds, now_ms)
        if found is not None:
            self._item_positions.update(found)
            self._catalogue_saved, self._changes_saved = found, self.sources.catalogue.num_changes
            logger.info("catalogue of %d items restored", self.sources.catalogue.num_alive)

    def _save_catalogue(self) -> None:
        """When a hundredth of it changed, or anything did and the file is old: writing a million items takes a second of one core."""
        read, now_s = dict(self._item_positions), self.clock.monotonic_s()
        changed = self.sources.catalogue.num_changes  # by rows that were given up, too
        records = sum(read.values()) - sum(self._catalogue_saved.get(p, 0) for p in read)
        changes = max(records, changed - self._changes_saved)
        many = changes > self.sources.catalogue.num_alive / 100
        if self.catalogue_ready and changes and (many or now_s - self._catalogue_saved_s > CATALOGUE_S):
            logs = positions.identities(self.log, (f"item/{partition}" for partition in read))
            catalogue_file.save(self._folder, self.sources, self.schema, read, logs, self.clock.now_ms())
            self._catalogue_saved, self._changes_saved, self._catalogue_saved_s = read, changed, now_s

    def not_ready(self) -> str:
        """Why this process cannot answer well yet; empty when it can."""
        if lasting := self._trouble.lasting(("start", "items", "state")) or self.log.trouble():
            return lasting
        if not self.catalogue_ready:
            return self._trouble.of("items") or "reading the catalogue"
        return "" if self.state_ready else self._trouble.of("state") or "reading the state log"

    def recommend(self, request: Request) -> tuple[Shown, dict[str, AsOf]]:
        """The answer, logged, and what its user state, counters and parameters contain at least."""
        # Read before the answer is made: read after it, they could promise an event that the answer does not know.
        contains = {"user_state": self.consumer.user_state, "counters": self.consumer.counters}
        self._idle.over()
        answer = self.pipeline.recommend(request, self.clock.now_ms())
        logged = False
        if self.config.ranking.log_impressions and answer.items:
            with metrics.STAGE_SECONDS.labels("log").time():
                try:
                    self.log.append("impression", [(request.user_id, messages.dump_impression(answer.impression))])
                    logged = True
                    self.intake.answered(request.request_id)
                except LogError as error:
                    logger.warning("impression not logged: %s", error)
        for reason in answer.degraded:
            metrics.DEGRADED.labels(reason).inc()
        for item in answer.items:
            for source in item.sources:
                metrics.SHOWN.labels(source).inc()
        if not logged and answer.items:
            answer = replace(answer, degraded=(*answer.degraded, "unlogged"))
            metrics.DEGRADED.labels("unlogged").inc()
        return answer, contains | {"parameters": answer.parameters}

    def accept(self, feedback: list[Feedback | Refused]) -> list[dict[str, str]]:
        """One outcome an event, in order. Raises LogError when it is not known that all that is good was accepted."""
        return self.intake.take(feedback)

    def forget(self, user_id: str, event_id: str) -> None:
        """Forget a user, in log order."""
        self.log.append(
            "feedback", [(user_id, messages.dump_forget(user_id, event_id=event_id, time_ms=self.clock.now_ms()))]
        )

    def user(self, user_id: str) -> tuple[UserState, AsOf]:
        """A user's state, and what it contains at least."""
        contains = self.consumer.user_state
        return self.store.get(user_id), contains

    def identities(self) -> dict[str, str]:
        """Which logs this system has, by topic: what was sent to another one is not here."""
        return {topic: self.log.identity(topic, 0) for topic in ("item", "feedback")}

    def settle_items(self, timeout_s: float = 2.0) -> None:
        """Until the catalogue holds all that was written before this call. Raises LogError when it does not in time."""
        deadline = time.monotonic() + timeout_s
        self.log.flush(timeout_s)
        ends = {partition: self.log.end("item", partition) for partition in self._item_positions}
        while any(self._item_positions[partition] < end for partition, end in ends.items()):
            if time.monotonic() > deadline or self._stop.wait(0.001):
                raise LogUnavailable(
                    f"the catalogue is more than {timeout_s:g} s behind its log: try again when /readyz says ready"
                )

    def _on_bad(self, record: Record, reason: str) -> None:
        metrics.DEAD_LETTERS.labels(record.topic, "malformed").inc()
        logger.warning("%s/%d/%d skipped: %s", record.topic, record.partition, record.offset, reason)

    def _follow_items(self) -> bool:
        worked = False
        for partition, position in self._item_positions.items():
            if not self.catalogue_ready and partition not in self._item_ends:
                self._item_ends[partition] = self.log.end("item", partition)
            records = self.log.read("item", partition, position, 5000)
            refused: list[str] = []
            for record in records:
                try:
                    self.generations.changed(self.sources.item(messages.parse_item(record.value, key=record.key)))
                except CatalogueFull as error:
                    refused.append(str(error))
                except BadInput as error:
                    self._on_bad(record, str(error))
            if refused:
                metrics.CATALOGUE_REFUSED.inc(len(refused))
                logger.error("%d new items of topic item are not in the catalogue: %s", len(refused), refused[-1])
            self._item_positions[partition] = records.next
            worked |= records.next > position
        if worked:
            self._idle.over()
        if worked or self.clock.monotonic_s() - self._freed_s > FREE_S:
            self._freed_s = self.clock.monotonic_s()
            self.sources.free_rows()
            metrics.CATALOGUE_ITEMS.set(self.sources.catalogue.num_alive)
            metrics.CATALOGUE_FULL.set(self.sources.catalogue.full_ratio)
        self.catalogue_ready |= all(self._item_positions[p] >= end for p, end in self._item_ends.items())
        return worked

    def _follow_state(self) -> bool:
        count = self.consumer.turn()
        if self.consumer.caught_up and not self.state_ready:
            self.on_caught_up()
            self.state_ready = True
        return count > 0

    def _follow_dense(self) -> bool:
        metrics.READY.set(not self.not_ready())
        self.sources.tell()
        metrics.USER_CACHE_BYTES.set(self._users.bytes)
        metrics.USER_STATE_FULL.set(getattr(self.store, "full_ratio", 0.0))
        metrics.DIGESTS_FULL.set(self.sources.events.full_ratio)
        self.scorer.poll()
        if self.scorer.refresh():
            logger.info("dense weights %d in use", self.scorer.dense_version)
        self._show_lag()
        return False

    def _show_lag(self) -> None:
        read = dict(self.consumer.counter_positions)
        lags = dict.fromkeys(read, math.nan)  # where it is not known the last number would look as if all were well
        try:
            lags = {place: max(0, end - read[place]) for place, end in positions.ends(self.log, read).items()}
        finally:
            for place, lag in lags.items():
                metrics.CONSUMER_LAG.labels(*place.rsplit("/", 1), "state").set(lag)

    @property
    def _building(self) -> bool:
        """Whether a generation is being built, or will be at once."""
        return self._builder.pid is not None or self.generations.due(self.clock.monotonic_s())

    def _build_generation(self) -> bool:
        generations, now_s = self.generations, self.clock.monotonic_s()
        if self._builder.idle:
            if generations.due(now_s):
                self._builder.start(generations.begin())
        elif built := self._builder.poll():
            generations.finish(*built, now_s)
            logger.info(
                "retrieval generation %s over %d items, recall@100 %.3f",
                generations.name,
                generations.num_items,
                generations.recall,
            )
        self._refresh_generation()
        return False

    def _refresh_generation(self) -> None:
        generations, now_s = self.generations, self.clock.monotonic_s()
        generations.refresh(now_s)
        if self.bandit is not None:
            self.bandit.refresh()
        metrics.GENERATION_AGE_SECONDS.set(generations.age_s(now_s))
        metrics.GENERATION_ITEMS.set(generations.num_items)
        metrics.GENERATION_RECALL.set(generations.recall)

    def save(self) -> bool:
        """Save catalogue, counters and recent users, so that a restart reads less of the log."""
        if self.state_ready:
            try:
                self._save_catalogue()
                if self.bandit is not None:
                    recent_users.save(self._folder, self.bandit.recent, self.schema)
                saved = snapshot.save(self._folder, self.sources, self.consumer, self.schema)
            except OSError as error:
                logger.error("catalogue or counters not saved (%s): they will be read again from the log", error)
                return False
            for place, offset in saved.items():  # retention keeps what is not yet in a snapshot
                topic, partition = place.rsplit("/", 1)
                self.log.commit(CONSUMER, topic, int(partition), offset)
        return False

    def close(self) -> None:
        """Stop the threads, save the counters, let go of everything."""
        self._stop.set()
        self._idle.over()
        self._loops.join()
        self._builder.close()
        try:
            self.save()
        except LogError as error:
            logger.warning("%s", error)
        if self._channel is not None:
            self._channel.close()
        self.store.close()
        self.log.close()
