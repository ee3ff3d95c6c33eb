"""The trainer as a pure function: `step(records, now_ms)` changes nothing but its state, and depends on nothing else.

What the clock and polling decide (which records, in which order, what time it is) is decided by the caller and journaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.capacity import bound_bytes
from recsys.config import Config
from recsys.errors import BadInput, LogError, StepFailed
from recsys.events import messages
from recsys.events.seen_ids import Kind, SeenIds
from recsys.features.build import Index, decode
from recsys.features.catalogue import Catalogue
from recsys.features.convert import Conversions
from recsys.features.schema import Schema
from recsys.model.layouts import layouts, parameters_name
from recsys.table.tables import Tables
from recsys.training import ledger
from recsys.training.bandit_learner import BanditLearner
from recsys.training.breaker import Breaker
from recsys.training.guard import Guard
from recsys.training.joiner import Joiner
from recsys.training.journal import Entry, log_ms
from recsys.training.learner import Batch, Learner
from recsys.training.migration.made_of import schemas
from recsys.training.opened import Emission
from recsys.training.steps import (
    EXPLORED,
    HELD,
    POSITIVES,
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
from recsys.types import FORGET, Feedback, Impression, Item, Record


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
        self._conversions = Conversions({}, self.schema)
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
        for unit, reason in entry.without.items():
            self._leave_out(unit, reason, report)
        self._take_all(records, entry, report)
        for unit, reason in entry.without.items():
            if not unit.startswith(REQUEST):
                continue
            self.ledger.lost(self.joiner.emitter.waiting([unit.removeprefix(REQUEST)]))
            if (dropped := self.joiner.drop(unit.removeprefix(REQUEST))) is not None:
                report.dead_letters.append(DeadLetter(record=dropped, reason=reason, kind="failed"))
        self.train(report, entry.now_ms, entry.learn)

    def units(self, records: Sequence[Record], now_ms: int) -> list[str]:
        """All that a step of these records is made of, and that can be left out of it."""
        due = self.joiner.emitter.due_requests(now_ms)
        held = self.joiner.held.requests()
        return [
            *map(place_of, records),
            *(REQUEST + name for name in due),
            *(HELD + name for name in held),
            POSITIVES,
            EXPLORED,
        ]

    def _leave_out(self, unit: str, reason: str, report: StepReport) -> None:
        if unit.startswith(HELD):
            letters = self.joiner.held.let_go(unit.removeprefix(HELD))
            self.ledger.settled[ledger.DEAD] += len(letters)
            report.dead_letters += [DeadLetter(record=r, reason=reason, kind="failed") for r in letters]
        elif unit == POSITIVES and self.towers:
            self.towers.drop_positives()
        elif unit == EXPLORED and self.bandit:
            self.bandit.drop_due()

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
            self._learn(report, now_ms)
            self._watch(report.emissions)
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
                return self.impression(messages.parse_impression(record.value), time_ms, report)
            return self.feedback(messages.parse_feedback(record.value, internal=True), time_ms, report)
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

    def impression(self, impression: Impression, now_ms: int, report: StepReport) -> str:
        """Open an impression, and say what became of it; BadInput when it was written with another schema."""
        if impression.features and impression.schema != self.schema.hash:
            impression = self._conversions.impression(impression)
        if impression.features:
            shown = len(decode(self.schema, impression.features).item_keys)
            if shown != len(impression.items):
                raise BadInput(
                    f"features: of {shown} items, the impression shows {len(impression.items)}; write both of one answer",
                    field="features",
                )
        served = self.bandit.served(impression) if self.bandit else None  # before anything is changed
        self.ledger.items += len(impression.items)
        if self.seen.too_late(Kind.REQUEST, impression.time_ms, now_ms):
            report.count("impression_too_late")
            return "impression_too_late"
        held = [HELD + impression.request_id] if impression.request_id in self.joiner.held else []
        with blaming(lambda: held):
            outcome = self.joiner.impression(impression, now_ms)
        report.count("impression_" + outcome)
        if outcome == "opened":
            self.breaker.shown(len(impression.items), now_ms)
            self.ledger.opened(len(impression.items))
        if self.towers and outcome != "duplicate":
            self.towers.impression(impression)
        if self.bandit and served:
            self.bandit.impression(impression, served, now_ms, self.joiner.early)
        elif self.bandit:
            for _, feedback in self.joiner.early:
                self.bandit.never(feedback)
        return "impression_" + outcome

    def explored(self, impression: Impression, now_ms: int) -> None:
        """Let the bandit alone learn from an impression."""
        if self.bandit and (served := self.bandit.served(impression)):
            self.bandit.impression(impression, served, now_ms)

    def feedback(self, feedback: Feedback, now_ms: int, report: StepReport) -> str:
        """Join one feedback to what was shown, and say what became of it."""
        if feedback.type == FORGET:
            if self.towers:
                self.towers.forget(feedback.user_id)
            report.count("forget")
            return "forget"
        # A copy of what comes too late may have been learned: nobody remembers for so long.
        if self.seen.too_late(Kind.EVENT, feedback.time_ms, now_ms):
            report.count("too_late")
            return "too_late"
        self.breaker.arrived(feedback.type, now_ms)
        outcome = self.joiner.feedback(feedback, now_ms)
        if outcome != "early":  # counted once it is known what becomes of it
            report.count(outcome)
        if self.towers:
            with blaming(lambda: [POSITIVES]):
                learned = self.towers.feedback(feedback, now_ms)
            if not learned:
                report.skipped("two_tower")
        if self.bandit and outcome != "early":
            self.bandit.feedback(feedback, now_ms)
        return ledger.HELD if outcome == "early" else outcome

    def _learn(self, report: StepReport, now_ms: int) -> None:
        """Train in batches of at most `batch_size` items, never mixing first and later emissions of an item."""
        batch: list[tuple[Emission, Index]] = []
        size, last = 0, True
        for emission in report.emissions:
            trained = emission.shown & emission.mask.any(1)
            for first in (True, False):
                rows = np.flatnonzero(trained & (emission.first == first))
                if not len(rows):
                    continue
                if batch and (first != last or size + len(rows) > self.config.training.batch_size):
                    self._learn_batch(batch, last, report, now_ms)
                    batch, size = [], 0
                batch.append((emission, rows))
                size, last = size + len(rows), first
        if batch:
            self._learn_batch(batch, last, report, now_ms)

    def _learn_batch(
        self, batch: Sequence[tuple[Emission, Index]], first: bool, report: StepReport, now_ms: int
    ) -> None:
        labels = np.concatenate([e.labels[rows] for e, rows in batch])
        mask = np.concatenate([e.mask[rows] for e, rows in batch])
        with blaming(lambda: [REQUEST + emission.request_id for emission, _ in batch]):
            features = [decode(self.schema, e.features).take(rows) for e, rows in batch]
            culprits = self.learner.learn(Batch(features=features, labels=labels, mask=mask, first=first), now_ms)
        if first and not culprits:
            served = np.concatenate([e.predictions[rows] for e, rows in batch])
            requests = [(len(rows), e.time_ms) for e, rows in batch]
            self.guard.add(self.learner.losses, labels, mask, served, requests, now_ms)
        self.guard.skipped(culprits, now_ms)
        for task in culprits:
            report.skipped(task)

    def _watch(self, emissions: Sequence[Emission]) -> None:
        known = [(emission, emission.shown & emission.final[:, 0]) for emission in emissions]
        self.breaker.watch(
            (int(final.sum()), int(emission.labels[final, 0].sum()), emission.time_ms)
            for emission, final in known
            if final.any()
        )

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
        self._conversions = Conversions(schemas(self.earlier, self.config), self.schema)
        self.joiner.restore(state["joiner"])
        if "ledger" in state:
            self.ledger.restore(state["ledger"])
        else:  # of before there was one
            self.ledger.begin(self.joiner.emitter.waiting(), len(self.joiner.held))
        if self.towers and state["towers"]:
            self.towers.restore(state["towers"])
