"""The trainer service: joins, learns, publishes, checkpoints."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from recsys import metrics
from recsys.clock import MAX_LEAD_MS, SystemClock
from recsys.config import Config
from recsys.errors import LogFull, LogTruncated, LogUnavailable, ParametersUnavailable, Stopped
from recsys.evaluation.measures import calibration, log_loss, normalized_entropy
from recsys.model.home import Reading
from recsys.model.layouts import parameters_name, sizes
from recsys.parameters.grpc_parameters import GrpcParameters
from recsys.streams.base import STUCK_S, EventLog
from recsys.streams.open_log import open_log
from recsys.streams.watch import SLOWEST_S
from recsys.training import learner
from recsys.training.intake import CONSUMER, TOPICS
from recsys.training.runner import Runner
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from services.common.process import NO_SPACE, FolderLock, HealthServer, Interrupted, Stop, logger
from services.common.rest import NET_S, Rest
from services.common.table_gauges import TableGauges
from services.common.trouble import Troubles
from services.trainer.pace import Pace

WINDOW = 5000
"""Examples behind the progressive gauges: half is noisier, double hides a change for longer."""

SAY_EVERY_S = 60.0
"""What stays wrong is said this often."""
READINGS_S = 10.0
"""Of gates and experts, which takes a whole forward pass: half costs twice as much, double hides a dead expert for longer."""
BREAKER_OPEN = "breaker open: feedback looks broken; learning waits for `recsys trainer resume --learn | --skip`"
TURN = "learning"
CATCHING_UP = "learning what was accepted before it started"
HELD = "model held back; learning goes on, and what it learns is served again once it is good, or `recsys rollback`"


class Progressive:
    """Progressive loss and calibration of each task over the last `WINDOW` examples: predictions as served, then the label."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._labels: list[list[np.ndarray]] = [[] for _ in tasks]
        self._predictions: list[list[np.ndarray]] = [[] for _ in tasks]

    def add(self, report: StepReport) -> None:
        for emission in report.emissions if report.learned else ():
            for task in np.flatnonzero(emission.final.any(0)):
                shown = emission.shown & emission.final[:, task]
                known = shown & np.isfinite(emission.predictions[:, task])
                labels = emission.labels[shown, task]
                positives = int(labels.sum())
                metrics.EXAMPLES.labels(self._tasks[task], "1").inc(positives)
                metrics.EXAMPLES.labels(self._tasks[task], "0").inc(len(labels) - positives)
                self._labels[task].append(emission.labels[known, task])
                self._predictions[task].append(emission.predictions[known, task])

    def show(self) -> None:
        for task, name in enumerate(self._tasks):
            labels, predictions = self._labels[task], self._predictions[task]
            while sum(map(len, labels[1:])) >= WINDOW:
                labels.pop(0), predictions.pop(0)
            y, p = (np.concatenate(x) if x else np.zeros(0) for x in (labels, predictions))
            if len(y) and 0 < y.sum() < len(y):
                metrics.PROGRESSIVE_LOG_LOSS.labels(name).set(log_loss(p, y))
                metrics.PROGRESSIVE_NORMALIZED_ENTROPY.labels(name).set(normalized_entropy(p, y))
                metrics.CALIBRATION_RATIO.labels(name).set(calibration(p, y))


def observe(report: StepReport, seconds: float) -> None:
    """Count what one step did."""
    metrics.TRAIN_STEP_SECONDS.observe(seconds)
    metrics.JOURNAL_STEPS.inc()
    for outcome, count in report.outcomes.items():
        metrics.JOINED.labels(outcome).inc(count)
    for task, count in report.skipped_batches.items():
        metrics.SKIPPED_BATCHES.labels(task).inc(count)
        logger.error("%d batches skipped: the gradient of task %r was not finite", count, task)
    for outcome in report.rewards:
        metrics.BANDIT_REWARDS.labels(outcome).inc()
    metrics.TABLE_EXPIRED_ROWS.inc(report.expired)
    metrics.TIME_AHEAD.inc(report.ahead)


def show_reading(reading: Reading) -> None:
    """Set the gauges of one level's gates and experts."""
    for output, weights in zip(reading.outputs, reading.gate_weights.tolist(), strict=True):
        for expert, weight in zip(reading.experts, weights, strict=True):
            metrics.GATE_WEIGHT.labels(reading.level, output, expert).set(weight)
    for expert, scale, dead in zip(reading.experts, reading.scales.tolist(), reading.dead.tolist(), strict=True):
        metrics.EXPERT_SCALE.labels(reading.level, expert).set(scale)
        metrics.DEAD_UNITS.labels(reading.level, expert).set(dead)


def show_fullness(trainer: Trainer) -> None:
    """Set the gauges of what is bounded beside the tables."""
    opened, held = trainer.joiner.full_ratios
    explored = trainer.bandit.opened.full_ratio if trainer.bandit else 0.0
    metrics.OPEN_IMPRESSIONS.set(len(trainer.joiner))
    metrics.OPEN_IMPRESSIONS_FULL.set(max(opened, explored))
    metrics.HELD_FEEDBACK_FULL.set(held)
    metrics.DIGESTS_FULL.set(trainer.seen.full_ratio)
    metrics.TOWER_USERS_FULL.set(trainer.towers.full_ratio if trainer.towers else 0.0)
    metrics.CATALOGUE_FULL.set(trainer.catalogue.full_ratio)


def gauges(runner: Runner, published: list[int]) -> None:
    """Set what is measured now and then; `published` holds (rows, tombstones) already counted."""
    for task in runner.trainer.schema.tasks:
        metrics.SKIPPED_BATCHES.labels(task)  # 0 from the start: an alert on its rate needs the series
    if runner.trainer.bandit:
        metrics.BANDIT_CLUSTERS.set(len(runner.trainer.bandit.clusters))
    show_fullness(runner.trainer)
    metrics.BREAKER_OPEN.set(runner.trainer.breaker.is_open)
    metrics.TRAINER_EPOCH.set(runner.epoch)
    metrics.CHECKPOINT_AGE_SECONDS.set(runner.checkpoint_age_s)
    metrics.MODEL_HELD.set(bool(runner.release.held))
    publisher = runner.release.publisher
    metrics.PUBLISHED_ROWS.inc(publisher.rows - published[0])
    metrics.PUBLISHED_TOMBSTONES.inc(publisher.tombstones - published[1])
    published[:] = publisher.rows, publisher.tombstones
    for (topic, partition), lag in runner.intake.lag().items():
        metrics.CONSUMER_LAG.labels(topic, str(partition), CONSUMER).set(lag)


def run(config: Config, stop: Stop, *, accept_gap: bool = False) -> None:
    """Learn until SIGTERM. Raises Fenced when a newer trainer took over; what else it raises leaves the state on disk as before
    the step it came from."""
    os.nice(10)
    torch.set_num_threads(1)  # of all sums in one order a replay is bit-equal
    with contextlib.ExitStack() as held:
        held.callback(FolderLock(config.data_dir, "trainer").release)
        reason: list[Callable[[], str]] = [lambda: "restoring"]
        held.callback(HealthServer(config.ranking.host, config.trainer.metrics_port, lambda: reason[0]()).close)
        try:
            with stop.interrupts():
                log = open_log(config, SystemClock(), "trainer")
                held.callback(log.close)
                loop = Loop(config, log, stop)
                loop.start(accept_gap=accept_gap)
        except Interrupted:
            return  # nothing was changed: the next start restores the same
        except LogTruncated as gap:  # not ready, with the reason, until somebody decides
            logger.error("%s", gap)
            why = str(gap)
            reason[0] = lambda: why
            while not stop.wait(1.0):
                pass
            raise
        threading.Thread(target=learner.warm_up, name="compile", daemon=True).start()
        reason[0] = loop.not_ready
        loop.run()


def served_epoch(config: Config) -> int:
    """The epoch that the parameter service believes: this trainer's must come after it. 0 when it does not answer."""
    client = GrpcParameters(config.parameter_address, parameters_name(config), 2.0)
    try:
        return client.lookup([]).state.version.epoch
    except ParametersUnavailable:
        return 0
    finally:
        client.close()


class Loop:
    """The runner's turns, one after the other, and what is said of them."""

    def __init__(self, config: Config, log: EventLog, stop: Stop) -> None:
        self._stop = stop
        self._progressive = Progressive(tuple(task.name for task in config.tasks))
        self._clock = SystemClock()
        self._runner = Runner(config, log, self._clock, self._on_step, stopped=lambda: bool(stop))
        self._published = [0, 0]
        self._tables = TableGauges()
        self._shown_s, self._ahead_s = 0.0, -SAY_EVERY_S
        self._readings_s = -READINGS_S
        self._open_s = -SAY_EVERY_S
        self._log = log
        self._troubles = Troubles()
        self._goal: dict[str, int] | None = None
        """Where the log ended when it began, or went on: what was accepted while it was away is learned and published first."""
        self._reason = ""
        """What of the learning itself makes it not ready."""

    def start(self, *, accept_gap: bool) -> None:
        """Restore; while the log cannot be reached, again and again."""
        self._runner.served_epoch = served_epoch(self._runner.config)
        while True:
            try:
                self._runner.start(accept_gap=accept_gap)
                self._show()  # whoever finds it ready finds its gauges, and an open breaker, too
            except (LogUnavailable, LogFull) as error:
                logger.warning("%s", error)
                self._stop.wait(0.5)
            else:
                break
        self._troubles.turned(TURN)
        runner = self._runner
        logger.info(
            "trainer epoch %d at step %d, %d items", runner.epoch, runner.trainer.steps, len(runner.trainer.catalogue)
        )
        logger.info("tables have room for %s", sizes(table.layout for table in runner.trainer.tables.values()))

    def not_ready(self) -> str:
        """Why what is accepted is not learned and served soon; empty when it is."""
        if why := self._reason or self._troubles.lasting((TURN,)) or self._log.trouble():
            return why
        return "" if self._goal == {} else CATCHING_UP

    def run(self) -> None:
        """Until told to stop; then publish and checkpoint what was learned."""
        try:
            rest, pace = Rest(self._log.watch(TOPICS), self._stop), Pace(self._stop)
            while not self._stop:
                pace.begin(self._read)
                if not rest.found(self._turn()):
                    rest(self._rest_s())
                elif self._goal == {}:  # what was accepted before it started is learned without a pause
                    pace.hold(self._read)
        except Interrupted:
            return  # in a step that waited for compilers: the journal has it
        except Stopped as error:
            logger.info("%s", error)  # in the middle of a step that failed: the next start goes on there
        self._close()

    def _rest_s(self) -> float:
        """How long to wait for the next record: less where a label will be final meanwhile."""
        soon_ms = self._clock.now_ms() + int(NET_S * 1000)
        return SLOWEST_S if self._runner.trainer.joiner.emitter.due(soon_ms) else NET_S

    @property
    def _read(self) -> int:
        return sum(self._runner.intake.positions.values())

    def _turn(self) -> bool:
        if self._goal == {} and self._troubles.waited_s(TURN) > STUCK_S:
            self._goal = None  # it was frozen, or its log was away: what came meanwhile is learned first
        try:
            with contextlib.nullcontext() if learner.ready() else self._stop.interrupts():
                worked = self._runner.turn()
            self._troubles.turned(TURN)
            if self._goal is None:
                self._goal = self._runner.intake.ends()
            elif self._goal and all(self._runner.intake.positions[key] >= end for key, end in self._goal.items()):
                self._goal = {}
            self._show()
        except (LogUnavailable, LogFull, OSError) as error:
            if isinstance(error, OSError):
                if error.errno not in NO_SPACE:
                    raise
                # Of a step that was begun nothing stays: it is run again when there is space.
                self._reason = f"{error}: learning waits for space"
            self._troubles.note(TURN, error)
            logger.warning("%s", error)
            self._stop.wait(0.5)
            return False
        return worked

    def _show(self) -> None:
        held = self._runner.release.held
        self._reason = BREAKER_OPEN if self._runner.trainer.breaker.is_open else f"{HELD}: {held}" if held else ""
        metrics.READY.set(not self.not_ready())
        if self._reason and time.monotonic() - self._open_s > SAY_EVERY_S:
            self._open_s = time.monotonic()
            logger.error("%s", self._reason)
        if time.monotonic() - self._shown_s > 1.0:
            self._shown_s = time.monotonic()
            self._progressive.show()
            gauges(self._runner, self._published)
            if self._shown_s - self._readings_s > READINGS_S and (found := self._runner.trainer.learner.readings()):
                self._readings_s = self._shown_s
                for reading in found:
                    show_reading(reading)
            self._tables.show(self._runner.trainer.tables)

    def _close(self) -> None:
        try:
            self._runner.close()
        except (LogUnavailable, LogFull, OSError) as error:
            logger.warning("no last checkpoint, the journal has every step since the one before: %s", error)

    def _on_step(self, report: StepReport, seconds: float) -> None:
        observe(report, seconds)
        if report.ahead and time.monotonic() - self._ahead_s > SAY_EVERY_S:
            self._ahead_s = time.monotonic()
            logger.warning(
                "%d records lead this machine's clock by more than %d s and count as of now: compare the clocks",
                report.ahead,
                MAX_LEAD_MS // 1000,
            )
        self._progressive.add(report)
