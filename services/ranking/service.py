"""The ranking process's parts, and the threads that keep them up to date."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
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
from recsys.errors import LogError, LogTruncated
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import scoring
from recsys.model.layouts import parameters_name
from recsys.parameters.base import Parameters
from recsys.parameters.grpc_parameters import GrpcParameters
from recsys.parameters.shared_rows import SharedParameters
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.shown import Shown
from recsys.state.cache import UserCache
from recsys.state.open_state import open_state
from recsys.streams import positions
from recsys.streams.base import EventLog
from recsys.types import AsOf, Feedback, UserState
from services.common.process import Stop, logger
from services.common.rest import NET_S, Rest
from services.common.trouble import Troubles
from services.ranking.builder import Builder
from services.ranking.building import Building
from services.ranking.feedback_intake import Intake
from services.ranking.item_follower import ItemFollower, skipped
from services.ranking.loops import Idle, Loops
from services.ranking.parse import Refused

POLL_S = 0.005
"""Whether the catalogue was read is looked at this often."""
CONSUMER = "state"
COMPILE_AFTER_S = 3.0
"""Requests are scored op by op for this long: a trainer beside this process compiles first, and what it compiled is read from the cache."""
SNAPSHOT_S = 60.0
"""Counters are saved this often; what came after is read again from the log."""


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
        builder = Builder(config, self._folder / "generations")
        self._building = Building(self.generations, self.bandit, builder, clock)
        self.pipeline = Pipeline(
            config, self.schema, self.store, self.sources, self.scorer, self.generations, self.bandit
        )
        self.consumer = StateConsumer(config, log, clock, self.store, self.sources, skipped)
        self._items = ItemFollower(log, clock, self.sources, self.schema, self._folder, self.generations.changed)
        self.intake = Intake(config, log, clock, self.sources, lambda: self._items.ready and self.state_ready)
        self.consumer.on_feedback = self.intake.heard
        self.patching = threading.Lock()
        """Held from reading items to appending their changes, so that two patches of one item both count."""
        self._trouble = Troubles()
        self._idle, self._loops = Idle(stop), Loops(stop, self._trouble)
        self.state_ready = False
        self.on_caught_up: Callable[[], object] = lambda: None
        """Called when catalogue, counters and state are in memory, before it is ready."""

    def start(self) -> None:
        """Read the catalogue, restore the counters, then follow everything in threads."""
        try:
            self._items.load(accept_gap=self._accept_gap)
            items = Rest(self.log.watch(("item",)), self._stop)

            def follow_items() -> bool:
                worked = items.found(self._items.turn())
                if worked:
                    self._idle.over()
                return worked

            self._loops.run("items", follow_items, items)
            while not self._items.ready:
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
        self._loops.run("generations", self._building.turn, self._idle.pause(0.1, lambda: self._building.busy))
        if not self._stop.wait(COMPILE_AFTER_S):
            _compile(by_kernels=not scoring.lacking(self.config))

    def restore(self) -> None:
        """What `start` reads, without its threads: whoever calls this calls `turn` and `save` from then on."""
        self._items.load(accept_gap=self._accept_gap)
        while not self._items.ready:
            self._items.turn()
        self._load_counters()

    def turn(self) -> bool:
        """One turn of what the threads of `start` do, the building of generations left out; whether there was anything to do."""
        worked = [self._items.turn(), self._follow_state()]
        self._follow_dense()
        self._building.refresh()
        return any(worked)

    def _load_counters(self) -> None:
        snapshot.load(self._folder, self.sources, self.consumer, self.schema, self.clock.now_ms())
        self.consumer.resume(accept_gap=self._accept_gap)
        if self.bandit is not None:
            self.bandit.recent.extend(recent_users.load(self._folder, self.schema))

    def not_ready(self) -> str:
        """Why this process cannot answer well yet; empty when it can."""
        if lasting := self._trouble.lasting(("start", "items", "state")) or self.log.trouble():
            return lasting
        if not self._items.ready:
            return self._trouble.of("items") or "reading the catalogue"
        return "" if self.state_ready else self._trouble.of("state") or "reading the state log"

    def recommend(self, request: Request) -> tuple[Shown, dict[str, AsOf]]:
        """The answer, logged, and what its user state, counters and parameters contain at least."""
        # Read before the answer is made: read after it, they could promise an event that the answer does not know.
        contains = {"user_state": self.consumer.user_state, "counters": self.consumer.counters}
        self._idle.over()
        answer = self.pipeline.recommend(request, self.clock.now_ms())
        if self.config.ranking.log_impressions and answer.items and _appended(self.log, request.user_id, answer):
            self.intake.answered(request.request_id)
        elif answer.items:
            answer = replace(answer, degraded=(*answer.degraded, "unlogged"))
        _count(answer)
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
        self._items.settle(self._stop, timeout_s)

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
        _show_lag(self.log, dict(self.consumer.counter_positions))
        return False

    def save(self) -> bool:
        """Save catalogue, counters and recent users, so that a restart reads less of the log."""
        if self.state_ready:
            try:
                self._items.save()
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
        self._building.close()
        try:
            self.save()
        except LogError as error:
            logger.warning("%s", error)
        if self._channel is not None:
            self._channel.close()
        self.store.close()
        self.log.close()


def _compile(*, by_kernels: bool) -> None:
    try:
        scoring.warm_up()
        metrics.SCORING_COMPILED.set(by_kernels)
    except OSError as error:  # the disk of the compiler's cache is full
        logger.error("operations run one by one, slower: what was compiled cannot be kept (%s)", error)


def _appended(log: EventLog, user_id: str, answer: Shown) -> bool:
    """Whether the answer's impression is in the log."""
    try:
        with metrics.STAGE_SECONDS.labels("log").time():
            log.append("impression", [(user_id, messages.dump_impression(answer.impression))])
    except LogError as error:
        logger.warning("impression not logged: %s", error)
        return False
    return True


def _count(answer: Shown) -> None:
    for reason in answer.degraded:
        metrics.DEGRADED.labels(reason).inc()
    for item in answer.items:
        for source in item.sources:
            metrics.SHOWN.labels(source).inc()


def _show_lag(log: EventLog, read: Mapping[str, int]) -> None:
    lags = dict.fromkeys(read, math.nan)  # where it is not known the last number would look as if all were well
    try:
        lags = {place: max(0, end - read[place]) for place, end in positions.ends(log, read).items()}
    finally:
        for place, lag in lags.items():
            metrics.CONSUMER_LAG.labels(*place.rsplit("/", 1), "state").set(lag)
