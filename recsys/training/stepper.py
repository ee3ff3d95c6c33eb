"""The trainer's state: loaded from checkpoint and log, and moved by journaled steps, now or again. Nothing is published."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

from recsys import metrics
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import StepFailed, Stopped
from recsys.streams.base import EventLog
from recsys.streams.positions import split
from recsys.training.checkpoint import Checkpoints
from recsys.training.deaths import Deaths, Trials
from recsys.training.intake import Intake, order_of
from recsys.training.journal import Entry, Journal
from recsys.training.letters import Letters
from recsys.training.migration.made_of import mark
from recsys.training.migration.succession import Succession
from recsys.training.old_towers import first_upserts
from recsys.training.recovery import without_culprits
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from recsys.types import Record

logger = logging.getLogger("recsys")


class Stepper:
    """Runs journaled steps; one that fails is run again, on the state of before it, without what made it fail. `crash` is called at each
    named gap, for crash tests; `stopped` says to leave off what a restart does again: restoring, and looking for what made a step fail."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        clock: Clock,
        crash: Callable[[str], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self._log, self._stopped = config, log, stopped
        self.folder = config.data_dir / "trainer"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(config, self.folder)
        self.journal = Journal(self.folder, mark(config))
        self.checkpoints = Checkpoints(self.folder, self.trainer, self.journal, crash)
        self.succession = Succession(partial(Stepper, log=log, clock=clock, crash=crash, stopped=stopped), config)
        self.intake = Intake(log, clock, self._leave_off)
        self.letters = Letters(log)
        self.deaths = Deaths(self.folder)
        self._fresh = True
        """Nothing was loaded into this trainer yet."""
        self.whole = False
        """The trainer's state is that of after a step: it may be published and checkpointed."""
        self.accept_gap = False
        """Whether the next load goes on although the log lost records that it needs."""
        self.starting = False
        """Whether the next step's entry says where it begins."""
        self._report: StepReport | None = None
        """Of the last attempt."""

    def restore(self) -> None:
        """The state after the journal's last step."""
        self._load()
        entries = list(self.journal.entries(self.trainer.steps + 1))
        newest = entries[-1].step if entries else 0
        for entry in entries:
            if self.deaths.begin(entry.step, newest):
                entry = self._without_deadly(entry)
            report = self.run(entry)
            if report.retried or entry.step == newest:  # nobody may have buried its letters
                self.letters.bury(report)
        self.whole = True

    def rerun(self) -> Iterator[int]:
        """The steps of checkpoint and journal, each after it ran: for whoever compares. Nothing is published or written down."""
        self._load()
        yield self.trainer.steps
        for entry in self.journal.entries(self.trainer.steps + 1):
            self.run(entry)
            yield self.trainer.steps

    def begin_anew(self) -> None:
        """A trainer into which nothing was loaded."""
        self.whole = False
        order = order_of(self._log)
        if not self._fresh or order != self.trainer.order:
            self.finish_checkpoint()
            self.trainer.close()
            del self.trainer, self.checkpoints.trainer
            gc.collect()  # the tables of before, whose memory those of now need
            self.trainer = self.checkpoints.trainer = Trainer(self.config, self.folder, order)
        self._fresh = False

    def _load(self) -> None:
        """The state of the last checkpoint."""
        self.begin_anew()
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
        self.starting = first is None
        self.read_catalogue(saved)

    def read_catalogue(self, saved: Mapping[str, int]) -> None:
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

    def run(self, entry: Entry, records: Sequence[Record] | None = None) -> StepReport:
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

    def finish_checkpoint(self) -> None:
        """Wait for one that is being written."""
        if (positions := self.checkpoints.poll(wait=True)) is not None:
            self.intake.commit(positions)
