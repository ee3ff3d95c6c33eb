"""The trainer as a pure function: `step(records, now_ms)` changes nothing but its state, and depends on nothing else.

What the clock and polling decide (which records, in which order, what time it is) is decided by the caller and journaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys.capacity import bound_bytes
from recsys.config import Config
from recsys.errors import BadInput, LogError, StepFailed
from recsys.events import messages
from recsys.events.seen_ids import SeenIds
from recsys.features.catalogue import Catalogue
from recsys.features.convert import Conversions
from recsys.features.schema import Schema
from recsys.model.layouts import layouts, parameters_name
from recsys.table.tables import Tables
from recsys.training import ledger
from recsys.training.bandit_learner import BanditLearner
from recsys.training.breaker import Breaker
from recsys.training.emission_learner import EmissionLearner
from recsys.training.guard import Guard
from recsys.training.joiner import Joiner
from recsys.training.journal import Entry, log_ms
from recsys.training.learner import Learner
from recsys.training.migration.made_of import schemas
from recsys.training.steps import (
    EXPLORED,
    REQUEST,
    DeadLetter,
    StepReport,
    blaming,
    content_of,
    partition_of,
    place_of,
    said,
)
from recsys.training.tower_learner import TowerLearner
from recsys.training.traffic import Traffic
from recsys.training.units import Units
from recsys.types import Item, Record


class Trainer:
    """Joiner, ranker, towers and bandit over one set of tables. Not thread-safe."""

    def __init__(self, config: Config, folder: Path, order: int | None = None) -> None:
        """`order`: of the tables' rows (see `Layout`); it must be the same in every run over the same records."""
        self.config = config
        self.schema = Schema.of(config)
        # Deleted items are unknown at once: a restart that reads a compacted log does not know them either.
        self.catalogue = Catalogue(
            self.schema, bound_bytes(config.capacity.memory_bytes, "catalogue"), keep=0.0, texts=False
        )
        self.parameters = parameters_name(config, self.schema)
        self.order = order
        seed = config.seed if order is None else order
        self.tables = Tables(layouts(config, self.schema, seed), config.table.implementation)
        self.seen = SeenIds(config.capacity.memory_bytes)
        self.joiner = Joiner(config.tasks, folder / "open", config.capacity.memory_bytes, self.seen)
        self.learner = Learner(config, self.schema, self.tables)
        self.towers = (
            TowerLearner(config, self.schema, self.tables, self.catalogue, self.seen)
            if config.training.two_tower
            else None
        )
        self.bandit = BanditLearner(config, self.tables, self.seen) if config.explores else None
        self.ledger = ledger.Ledger(self.schema.tasks)
        self.steps = 0
        self.covers_ms = 0
        self.breaker = Breaker(config)
        self.guard = Guard(config)
        self.earlier: list[Mapping[str, Any]] = []
        """Configurations of before (`describe`): impressions that were written under them are read by the names of their features."""
        self.traffic = Traffic(self.schema, self.seen, self.joiner, self.breaker, self.ledger, self.towers, self.bandit)
        self._emission_learner = EmissionLearner(
            self.schema, self.learner, self.guard, self.breaker, config.training.batch_size
        )
        self.units = Units(self.joiner, self.ledger, self.towers, self.bandit)
        self.buried: set[str] = set()
        """Contents of `item` records with which a step failed: a restart, which reads that topic again, leaves them out, too."""

    def step(self, records: Sequence[Record], entry: Entry) -> StepReport:
        """Take the records in order, close what is due at the entry's log time, train on it.

        StepFailed: the state is neither that of before nor that of after; throw it away.
        """
        report = StepReport()
        with blaming(list):
            self._step(records, entry, report)
        return report

    def _step(self, records: Sequence[Record], entry: Entry, report: StepReport) -> None:
        if entry.resume:
            self.breaker.resume(entry.resume)
        elif entry.learn and self.breaker.skipping:  # all of that is read: what it opened is left out, too
            self.breaker.close()
            self.ledger.lost(self.joiner.emitter.waiting(), ledger.UNLEARNED)
            self.joiner.drop_all()
        if entry.now_ms < self.covers_ms:
            self._set_back(entry.now_ms)
        self.units.leave_out(entry.without, report)
        self._take_all(records, entry, report)
        self.units.leave_out_requests(entry.without, report)
        self.train(report, entry.now_ms, entry.learn)

    def _take_all(self, records: Sequence[Record], entry: Entry, report: StepReport) -> None:
        first: Exception | None = None
        suspects: list[str] = []
        others: list[str] = []
        for record in records:
            if entry.without and (reason := entry.without.get(place_of(record))) is not None:
                report.dead_letters.append(DeadLetter(record=record, reason=reason, kind="failed"))
                self.ledger.took(partition_of(record), record.offset, ledger.DEAD)
                if record.topic == "item":
                    self.buried.add(content_of(record))
                continue
            time_ms = log_ms(record, entry.wall_ms)
            report.ahead += time_ms < record.time_ms
            try:
                outcome = self.take(record, report, time_ms)
                self.ledger.took(partition_of(record), record.offset, outcome)
            except (OSError, LogError):
                raise
            except Exception as error:  # noqa: BLE001 - raised below, when all are known with which it happens
                if first is None:
                    first, suspects = error, [*getattr(error, "suspects", ()), place_of(record)]
                else:
                    others.append(place_of(record))
        if first is not None:
            raise StepFailed(said(first), suspects, others) from first

    def train(self, report: StepReport, now_ms: int, learn: bool = True) -> None:
        """The second half of a step: labels that are final at `now_ms`, then what is due by step number."""
        with blaming(lambda: [REQUEST + closing] if (closing := self.joiner.emitter.closing) else []):
            report.emissions = list(self.joiner.close(now_ms))
        for emission in report.emissions:
            self.ledger.final(emission.labels, emission.final, emission.shown, learned=learn)
        for outcome in self.joiner.held.take_settled():
            report.count(outcome)
            self.ledger.settled[outcome] += 1
        for feedback in self.joiner.held.take_never():
            if self.bandit:
                self.bandit.never(feedback)
        report.learned = learn
        if learn:
            self._emission_learner.learn(report.emissions, report, now_ms)
        if self.bandit:
            with blaming(lambda: [EXPLORED]):
                self.bandit.step(now_ms, learn)
            report.rewards = self.bandit.take_outcomes()
        self.covers_ms = max(self.covers_ms, now_ms)
        self.steps += 1
        if self.steps % self.config.training.expire_every_steps == 0:
            with blaming(list):
                report.expired = self.tables.expire(now_ms)

    def _set_back(self, now_ms: int) -> None:
        """Log time was ahead of the clock by more than the bound: bring back what was opened ahead."""
        self.covers_ms = now_ms
        self.seen.set_back(now_ms)
        self.joiner.set_back(now_ms)
        if self.bandit:
            self.bandit.set_back(now_ms)

    def take(self, record: Record, report: StepReport, time_ms: int) -> str:
        """Take one record of `item`, `impression` or `feedback` at a log time; what cannot be used becomes a dead letter.

        Returns what became of it."""
        try:
            if record.topic == "item":
                self.item(messages.parse_item(record.value, key=record.key))
                return "item"
            if record.topic == "impression":
                return self.traffic.impression(messages.parse_impression(record.value), time_ms, report)
            return self.traffic.feedback(messages.parse_feedback(record.value, internal=True), time_ms, report)
        except BadInput as error:
            report.dead_letters.append(DeadLetter(record=record, reason=str(error)))
            return ledger.DEAD

    def known(self, record: Record) -> None:
        """Take a record of `item` again, which a step before the checkpoint took."""
        if not self.buried or content_of(record) not in self.buried:
            with contextlib.suppress(BadInput):  # it is a dead letter since then
                self.item(messages.parse_item(record.value, key=record.key))

    def item(self, item: Item) -> None:
        self.catalogue.apply(item)
        self.catalogue.free_rows()

    def close(self) -> None:
        """Close its files; it is not used again."""
        self.joiner.spill.close()

    def small_state(self) -> dict[str, Any]:
        """Everything beside tables, networks, bandit and catalogue, as JSON-able values."""
        return {
            "steps": self.steps,
            "covers_ms": self.covers_ms,
            "breaker": self.breaker.state(),
            "guard": self.guard.state(),
            "buried": sorted(self.buried),
            **({"earlier": list(self.earlier)} if self.earlier else {}),
            "joiner": self.joiner.state(),
            "ledger": self.ledger.state(),
            "waiting": {"labels": self.joiner.emitter.waiting(), "held": len(self.joiner.held)},
            "towers": self.towers.state() if self.towers else None,
        }

    def restore_small(self, state: dict[str, Any]) -> None:
        self.steps, self.covers_ms = state["steps"], state["covers_ms"]
        if "breaker" in state:
            self.breaker.restore(state["breaker"])
        else:  # of a release whose breaker knew only labels: it is judged anew
            self.breaker.is_open = state["breaker_open"]
        if "guard" in state:
            self.guard.restore(state["guard"])
        self.buried = set(state.get("buried", ()))
        self.earlier = state.get("earlier", [])
        self.traffic.conversions = Conversions(schemas(self.earlier, self.config), self.schema)
        self.joiner.restore(state["joiner"])
        if "ledger" in state:
            self.ledger.restore(state["ledger"])
        else:  # of before there was one
            self.ledger.begin(self.joiner.emitter.waiting(), len(self.joiner.held))
        if self.towers and state["towers"]:
            self.towers.restore(state["towers"])
