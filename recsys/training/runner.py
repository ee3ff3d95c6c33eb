"""The trainer over time: restart, poll, journal, step, publish, checkpoint."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from recsys import metrics
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import LogTruncated, SchemaMismatch, SnapshotCorrupt, StepFailed, Stopped
from recsys.events.dead_letters import letter as dead_letter
from recsys.streams.base import EventLog
from recsys.streams.positions import split
from recsys.training import commands
from recsys.training.checkpoint import Checkpoints
from recsys.training.deaths import Deaths, Trials
from recsys.training.intake import CONSUMER, Intake, log_time, order_of
from recsys.training.journal import Entry, Journal
from recsys.training.migration.made_of import mark
from recsys.training.migration.succession import Succession
from recsys.training.old_towers import first_upserts
from recsys.training.recovery import without_culprits
from recsys.training.release import Release
from recsys.training.rollback import Rollback, find, forget_rollback, read_rollback, stand, step_above_all
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from recsys.types import Record

logger = logging.getLogger("recsys")
RESUME_S = 1.0
"""A command that nothing waits for is looked for this often."""

OnStep = Callable[[StepReport, float], None]


class Runner:
    """One trainer process's loop. `crash` is called at each named gap, for crash tests; `stopped` says to leave off what a
    restart does again: restoring, and looking for what made a step fail."""

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
        self._on_step, self._crash, self._stopped = on_step, crash, stopped
        self.folder = config.data_dir / "trainer"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(config, self.folder)
        self.journal = Journal(self.folder, mark(config))
        self.checkpoints = Checkpoints(self.folder, self.trainer, self.journal, crash)
        self.succession = Succession(partial(Runner, log=log, clock=clock, crash=crash, stopped=stopped), config)
        self.release = Release(self.folder, log, self.trainer, self.checkpoints)
        self.intake = Intake(log, clock, self._leave_off)
        self._deaths = Deaths(self.folder)
        self._letters: list[tuple[str, bytes]] = []
        self._fresh = True
        """Nothing was loaded into this trainer yet."""
        self.whole = False
        """The trainer's state is that of after a step: it may be published and checkpointed."""
        self.served_epoch = 0
        """What the parameter service prefers already, where it was asked."""
        self.accept_gap = False
        self._starting = False
        """Whether the next step's entry says where it begins."""
        self._report: StepReport | None = None
        """Of the last attempt."""
        self._last = dict.fromkeys(("rows", "dense", "resume", "rollback"), 0.0) | {"checkpoint": clock.monotonic_s()}

    def start(self, *, accept_gap: bool = False, publish: bool = True) -> None:
        """Take the next epoch, load, run the journal's steps again without publishing, then publish what they changed.

        Raises LogTruncated when the log no longer has what the checkpoint needs, unless `accept_gap`; LogUnavailable: call again.
        """
        if not self.epoch:
            self.release.take_epoch(self.served_epoch)
        self.accept_gap = accept_gap
        self.journal.trim_torn_tail()
        if publish and (command := read_rollback(self.folder)) is not None and self._roll_back(command):
            return
        try:
            self.restore()
        finally:
            self._deaths.survived()  # what raises did not end the process
        self._crash("replayed")
        if publish:
            self.release.begin()

    def restore(self) -> None:
        """The state after the journal's last step."""
        self._load()
        entries = list(self.journal.entries(self.trainer.steps + 1))
        newest = entries[-1].step if entries else 0
        for entry in entries:
            if self._deaths.begin(entry.step, newest):
                entry = self._without_deadly(entry)
            report = self._run(entry)
            if report.retried or entry.step == newest:  # nobody may have buried its letters
                self._bury(report)
        self.whole = True

    def rerun(self) -> Iterator[int]:
        """The steps of checkpoint and journal, each after it ran: for whoever compares. Nothing is published or written down."""
        self._load()
        yield self.trainer.steps
        for entry in self.journal.entries(self.trainer.steps + 1):
            self._run(entry)
            yield self.trainer.steps

    def _begin_anew(self) -> None:
        """A trainer into which nothing was loaded."""
        self.whole = False
        order = order_of(self._log)
        if not self._fresh or order != self.trainer.order:
            self._finish_checkpoint()
            self.trainer.close()
            publisher = self.release.publisher
            del self.trainer, self.checkpoints.trainer, publisher.trainer
            gc.collect()  # the tables of before, whose memory those of now need
            self.trainer = self.checkpoints.trainer = Trainer(self.config, self.folder, order)
            publisher.follow(self.trainer)
        self._fresh = False

    def _load(self) -> None:
        """The state of the last checkpoint."""
        self._begin_anew()
        kept = self.succession.load(self.checkpoints, accept_gap=self.accept_gap)
        saved, logs = kept, self.checkpoints.logs
        first = next(self.journal.entries(self.trainer.steps + 1), None)
        if first is not None:
            saved, logs = {**saved, **first.starts}, {**logs, **first.logs}
        if self.intake.begin(saved, logs, accept_gap=self.accept_gap) and first is not None:
            logger.error("the steps since the checkpoint cannot be run again: what is left of them is read anew")
            self.journal.discard()
            first = None
        self.accept_gap = False  # once
        for key, position in self.intake.positions.items():
            if position != kept.get(key, position):
                self.trainer.ledger.passed_gap(key, kept[key], position)
        self._starting = first is None
        self._read_catalogue(saved)

    def _read_catalogue(self, saved: Mapping[str, int]) -> None:
        """The catalogue is not checkpointed: the `item` topic is compacted, and read again up to the saved position."""
        for key in self.intake.positions.keys() & saved.keys():
            (topic, partition), end = split(key), self.intake.positions[key]
            if topic != "item":
                continue
            towers, records = self.trainer.towers, self.intake.range(key, self._log.begin(topic, partition), end)
            if towers is not None and towers.numbered is not None:
                kept = list(records)
                self._know(kept)
                towers.number(first_upserts(kept) if self._log.partitions(topic) == 1 else None)
            else:
                self._know(records)

    def _know(self, records: Iterable[Record]) -> None:
        for record in records:
            self._leave_off()
            self.trainer.known(record)

    def _leave_off(self) -> None:
        if self._stopped():
            raise Stopped("the trainer was told to stop: a restart goes on from its last checkpoint and journal")

    def _run(self, entry: Entry, records: Sequence[Record] | None = None) -> StepReport:
        """Run a journaled step, now or again: the same records, the same time. If it fails, then without what made it fail."""
        self._leave_off()
        self.whole = False
        try:
            report = self.trainer.step(self.intake.again(entry.ends) if records is None else records, entry)
        except StepFailed as failure:
            report = self._recover(entry, failure)
        self.intake.passed(entry.ends)
        self.whole = True
        return report

    def _recover(self, entry: Entry, failure: StepFailed | None) -> StepReport:
        """Nothing stays of an attempt that failed. The journal says what is left out before the step is run without it."""
        while failure is not None:
            metrics.STEP_FAILURES.inc()
            logger.error("step %d failed (%s): it is run again without what made it fail", entry.step, failure)
            entry = without_culprits(entry, failure, self.fails, self._units)
            self.journal.append(entry)
            failure = self.fails(entry)
        assert self._report is not None
        self._report.retried = True
        return self._report

    def _without_deadly(self, entry: Entry) -> Entry:
        """The step without what ends the process that runs it: two did end in it."""
        logger.error("two processes ended in step %d: it is tried in others first", entry.step)
        with closing(Trials(self.config, self._stopped)) as trials:
            while (failure := trials.fails(entry)) is not None:
                entry = without_culprits(entry, failure, trials.fails, self._units)
                self.journal.append(entry)
        self._before(entry.step)  # the others wrote into the files of open impressions
        return entry

    def fails(self, entry: Entry) -> StepFailed | None:
        """What a step fails with on the state of before it; it then is the state of after, or none."""
        self._before(entry.step)
        try:
            self._report = self.trainer.step(self.intake.again(entry.ends), entry)
        except StepFailed as failure:
            return failure
        return None

    def _units(self, entry: Entry) -> list[str]:
        self._before(entry.step)
        return self.trainer.units.of(self.intake.again(entry.ends), entry.now_ms)

    def _before(self, step: int) -> None:
        """The state of before a step: the last checkpoint, and the journal's steps up to it."""
        self._load()
        for entry in self.journal.entries(self.trainer.steps + 1):
            if entry.step == step:
                break
            self._leave_off()
            self.trainer.step(self.intake.again(entry.ends), entry)
            self.intake.passed(entry.ends)

    def turn(self) -> bool:
        """One turn of the loop; False when there was nothing to do (then wait a little)."""
        if not self.whole:  # the log could not be read while a step that failed was looked into
            self.restore()
        self._look_for_rollback()
        breaker = self.trainer.breaker
        if command := self._command():
            worked = self._step(learn=command["how"] != commands.SKIP, resume=command)
        elif breaker.skipping:
            reached = all(self.intake.positions.get(key, end) >= end for key, end in breaker.skipping.items())
            worked = self._step(learn=reached, until=None if reached else breaker.skipping)
        else:
            worked = not breaker.is_open and self._step(learn=True)
        self._publish()
        self._checkpoint()
        return worked

    def _command(self) -> dict[str, Any] | None:
        """What `recsys trainer resume --learn | --skip` left in a file for the open breaker; it is deleted once the journal has it."""
        breaker, now_s = self.trainer.breaker, self._clock.monotonic_s()
        waits = breaker.is_open and not breaker.skipping
        if not waits and now_s - self._last["resume"] < RESUME_S:
            return None
        self._last["resume"] = now_s
        if (command := commands.read(self.folder, commands.RESUME)) is None:
            return None
        if not waits or command["name"] == breaker.resumed:
            logger.warning("resume --%s: nothing waits for it, the breaker is closed", command["how"])
            commands.forget(self.folder, commands.RESUME)
            return None
        logger.info("resume --%s: learning goes on", command["how"])
        return {**command, "ends": self.intake.ends()} if command["how"] == commands.SKIP else command

    def _step(
        self, *, learn: bool, until: Mapping[str, int] | None = None, resume: dict[str, Any] | None = None
    ) -> bool:
        self._send_letters()
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
        if self._starting:
            # The log that these positions are in may be another one than the checkpoint's, or there is none.
            entry = replace(entry, starts=dict(self.intake.positions), logs=self.intake.logs)
        self.journal.append(entry)
        self._starting = False
        if resume:
            commands.forget(self.folder, commands.RESUME)
        self._crash("journaled")
        started = time.perf_counter()
        report = self._run(entry, polled.records)
        self._crash("stepped")
        self._on_step(report, time.perf_counter() - started)
        self._bury(report)
        return True

    def _bury(self, report: StepReport) -> None:
        for letter in report.dead_letters:
            key, value = dead_letter(letter.record, letter.reason)
            metrics.DEAD_LETTERS.labels(letter.record.topic, letter.kind).inc()
            logger.warning("dead letter %s: %s", key, letter.reason)
            self._letters.append((key, value))
        self._send_letters()

    def _send_letters(self) -> None:
        if self._letters:
            # When the log is full they wait here, and learning with them.
            self._log.append("dead_letter", self._letters)
            self._letters = []

    def _look_for_rollback(self) -> None:
        if self._clock.monotonic_s() - self._last["rollback"] < RESUME_S:
            return
        self._last["rollback"] = self._clock.monotonic_s()
        command = read_rollback(self.folder)
        if command is not None and command.name != self.checkpoints.rolled_back:
            self._roll_back(command)

    def _roll_back(self, command: Rollback) -> bool:
        """Go back to a checkpoint. False when that cannot be: then nothing was changed."""
        self._finish_checkpoint()  # after it is found nothing may be swept
        try:
            manifest = find(self.checkpoints, self._log, command)
        except (LogTruncated, SnapshotCorrupt, SchemaMismatch) as error:
            logger.error("no rollback to checkpoint %d: %s", command.step, error)
            forget_rollback(self.folder)
            return False
        step = step_above_all(self.trainer.steps, self.checkpoints, self.journal)
        self._begin_anew()
        saved = self.checkpoints.go_back(manifest)
        stand(self.trainer, self.intake, saved, self.checkpoints.logs, skip=command.skips)
        self._read_catalogue(saved)
        self.trainer.steps, self.checkpoints.rolled_back = step, command.name
        self.whole = self._starting = True
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
            self._commit(positions)
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
                self._commit(self.checkpoints.kept_positions)

    @property
    def checkpoint_age_s(self) -> float:
        """Seconds since the last checkpoint began."""
        return self._clock.monotonic_s() - self._last["checkpoint"]

    @property
    def epoch(self) -> int:
        return self.release.publisher.epoch

    def _finish_checkpoint(self) -> None:
        if (positions := self.checkpoints.poll(wait=True)) is not None:
            self._commit(positions)

    def _commit(self, positions: Mapping[str, int]) -> None:
        for key, offset in positions.items():
            self._log.commit(CONSUMER, *split(key), offset)

    def close(self) -> None:
        """Stop: a last publish and checkpoint, if the state is that of after a step; else a restart goes on from the last one."""
        if self.whole:
            self.checkpoint(wait=True)
        self.checkpoints.close()
        self.journal.close()
