"""The trainer over time: restart, poll, journal, step, publish, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from recsys import metrics
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import LogTruncated, SchemaMismatch, SnapshotCorrupt
from recsys.streams.base import EventLog
from recsys.training import commands
from recsys.training.intake import log_time
from recsys.training.journal import Entry
from recsys.training.operator_commands import OperatorCommands
from recsys.training.release import Release
from recsys.training.rollback import Rollback, find, forget_rollback, read_rollback, stand, step_above_all
from recsys.training.stepper import Stepper
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer

logger = logging.getLogger("recsys")

OnStep = Callable[[StepReport, float], None]


class Runner:
    """One trainer process's loop: what is done when, by the clock and by commands. `crash` and `stopped`: see `Stepper`."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        clock: Clock,
        on_step: OnStep = lambda *_: None,
        crash: Callable[[str], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self._log, self._clock = config, log, clock
        self._on_step, self._crash = on_step, crash
        self.stepper = Stepper(config, log, clock, crash, stopped)
        self.folder, self.journal = self.stepper.folder, self.stepper.journal
        self.checkpoints = self.stepper.checkpoints
        self.intake, self.succession = self.stepper.intake, self.stepper.succession
        self.release = Release(self.folder, log, self.checkpoints)
        self.served_epoch = 0
        """What the parameter service prefers already, where it was asked."""
        self._commands = OperatorCommands(self.folder, clock)
        self._last = {"rows": 0.0, "dense": 0.0, "checkpoint": clock.monotonic_s()}

    @property
    def trainer(self) -> Trainer:
        """The one of now: a step that fails costs it."""
        return self.stepper.trainer

    def start(self, *, accept_gap: bool = False) -> None:
        """Take the next epoch, load, run the journal's steps again without publishing, then publish what they changed.

        Raises LogTruncated when the log no longer has what the checkpoint needs, unless `accept_gap`; LogUnavailable: call again.
        """
        if not self.epoch:
            self.release.take_epoch(self.served_epoch)
        self.stepper.accept_gap = accept_gap
        self.journal.trim_torn_tail()
        if (command := read_rollback(self.folder)) is not None and self._roll_back(command):
            return
        try:
            self.stepper.restore()
        finally:
            self.stepper.deaths.survived()  # what raises did not end the process
        self._crash("replayed")
        self.release.begin()

    def turn(self) -> bool:
        """One turn of the loop; False when there was nothing to do (then wait a little)."""
        if not self.stepper.whole:  # the log could not be read while a step that failed was looked into
            self.stepper.restore()
        if (rollback := self._commands.rollback(self.checkpoints.rolled_back)) is not None:
            self._roll_back(rollback)
        breaker = self.trainer.breaker
        if command := self._commands.resume(breaker, self.intake.ends):
            worked = self._step(learn=command["how"] != commands.SKIP, resume=command)
        elif breaker.skipping:
            reached = all(self.intake.positions.get(key, end) >= end for key, end in breaker.skipping.items())
            worked = self._step(learn=reached, until=None if reached else breaker.skipping)
        else:
            worked = not breaker.is_open and self._step(learn=True)
        self._publish()
        self._checkpoint()
        return worked

    def _step(
        self, *, learn: bool, until: Mapping[str, int] | None = None, resume: dict[str, Any] | None = None
    ) -> bool:
        self.stepper.letters.send()
        polled = self.intake.poll({} if resume else until)
        now_ms = log_time(self.trainer.covers_ms, polled)
        moved = polled.records or resume or now_ms < self.trainer.covers_ms or self.trainer.joiner.emitter.due(now_ms)
        if not moved and not (learn and self.trainer.breaker.skipping):
            self.intake.passed(polled.ends)  # behind what is no record: nothing to run again
            return False
        # 1. Write down what this step will be; 2. run it; 3. report; dead letters may repeat after a crash, under the same key.
        entry = Entry(
            step=self.trainer.steps + 1,
            now_ms=now_ms,
            ends=polled.ends,
            learn=learn,
            wall_ms=polled.wall_ms,
            resume=resume or {},
        )
        if self.stepper.starting:
            # The log that these positions are in may be another one than the checkpoint's, or there is none.
            entry = replace(entry, starts=dict(self.intake.positions), logs=self.intake.logs)
        self.journal.append(entry)
        self.stepper.starting = False
        if resume:
            self._commands.resumed()
        self._crash("journaled")
        started = time.perf_counter()
        report = self.stepper.run(entry, polled.records)
        self._crash("stepped")
        self._on_step(report, time.perf_counter() - started)
        self.stepper.letters.bury(report)
        return True

    def _roll_back(self, command: Rollback) -> bool:
        """Go back to a checkpoint. False when that cannot be: then nothing was changed."""
        self.stepper.finish_checkpoint()  # after it is found nothing may be swept
        try:
            manifest = find(self.checkpoints, self._log, command)
        except (LogTruncated, SnapshotCorrupt, SchemaMismatch) as error:
            logger.error("no rollback to checkpoint %d: %s", command.step, error)
            forget_rollback(self.folder)
            return False
        step = step_above_all(self.trainer.steps, self.checkpoints, self.journal)
        self.stepper.begin_anew()
        saved = self.checkpoints.go_back(manifest)
        stand(self.trainer, self.intake, saved, self.checkpoints.logs, skip=command.skips)
        self.stepper.read_catalogue(saved)
        self.trainer.steps, self.checkpoints.rolled_back = step, command.name
        self.stepper.whole = self.stepper.starting = True
        self.release.take_epoch()
        self.release.publish_whole()
        self._crash("rolled back")
        self.checkpoint(wait=True)
        after = "left out" if command.skips else "learned again"
        logger.warning("rolled back to checkpoint %d; what came after it is %s", command.step, after)
        return True

    def _publish(self, *, force: bool = False) -> None:
        training, now, bandit = self.config.training, self._clock.monotonic_s(), self.trainer.bandit
        force = force or (bandit is not None and bandit.moved)
        dense = force or now - self._last["dense"] >= training.dense_publish_s
        if dense or now - self._last["rows"] >= training.publish_ms / 1000:
            self.release.publish(dense=dense)
            self._last["rows"] = now
        if dense:
            self._last["dense"] = now
            if bandit is not None:
                bandit.moved = False

    def _checkpoint(self) -> None:
        if (positions := self.checkpoints.poll()) is not None:
            self.intake.commit(positions)
        if self._clock.monotonic_s() - self._last["checkpoint"] >= self.config.training.checkpoint_s:
            self.checkpoint(wait=False)

    def checkpoint(self, *, wait: bool) -> None:
        """Publish, then take a checkpoint: what it holds is always published before."""
        self._publish(force=True)
        self._log.flush()
        with metrics.CHECKPOINT_SECONDS.time():
            taken = self.checkpoints.save(self.intake.positions, self.intake.logs, wait=wait)
        if taken:
            self._last["checkpoint"] = self._clock.monotonic_s()
            if wait:
                self.intake.commit(self.checkpoints.kept_positions)

    @property
    def checkpoint_age_s(self) -> float:
        """Seconds since the last checkpoint began."""
        return self._clock.monotonic_s() - self._last["checkpoint"]

    @property
    def epoch(self) -> int:
        return self.release.publisher.epoch

    def close(self) -> None:
        """Stop: a last publish and checkpoint, if the state is that of after a step; else a restart goes on from the last one."""
        if self.stepper.whole:
            self.checkpoint(wait=True)
        self.checkpoints.close()
        self.journal.close()
