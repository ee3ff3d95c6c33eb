"""What a step is made of, and leaving some of it out: what made it fail (`recovery.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recsys.training import ledger
from recsys.training.bandit_learner import BanditLearner
from recsys.training.joiner import Joiner
from recsys.training.steps import EXPLORED, HELD, POSITIVES, REQUEST, DeadLetter, StepReport, place_of
from recsys.training.tower_learner import TowerLearner
from recsys.types import Record


class Units:
    """A step's units beside its records: what is due in the joiner, the towers and the bandit."""

    def __init__(
        self, joiner: Joiner, counts: ledger.Ledger, towers: TowerLearner | None, bandit: BanditLearner | None
    ) -> None:
        self._joiner, self._ledger, self._towers, self._bandit = joiner, counts, towers, bandit

    def of(self, records: Sequence[Record], now_ms: int) -> list[str]:
        """All that a step of these records is made of, and that can be left out of it."""
        due = self._joiner.emitter.due_requests(now_ms)
        held = self._joiner.held.requests()
        return [
            *map(place_of, records),
            *(REQUEST + name for name in due),
            *(HELD + name for name in held),
            POSITIVES,
            EXPLORED,
        ]

    def leave_out(self, units: Mapping[str, str], report: StepReport) -> None:
        """Forget these, with their reasons, before the records are taken; open impressions stay until after it."""
        for unit, reason in units.items():
            if unit.startswith(HELD):
                letters = self._joiner.held.let_go(unit.removeprefix(HELD))
                self._ledger.settled[ledger.DEAD] += len(letters)
                report.dead_letters += [DeadLetter(record=r, reason=reason, kind="failed") for r in letters]
            elif unit == POSITIVES and self._towers:
                self._towers.drop_positives()
            elif unit == EXPLORED and self._bandit:
                self._bandit.drop_due()

    def leave_out_requests(self, units: Mapping[str, str], report: StepReport) -> None:
        """Forget the open impressions among these, which the records have labelled by now."""
        for unit, reason in units.items():
            if not unit.startswith(REQUEST):
                continue
            self._ledger.lost(self._joiner.emitter.waiting([unit.removeprefix(REQUEST)]))
            if (dropped := self._joiner.drop(unit.removeprefix(REQUEST))) is not None:
                report.dead_letters.append(DeadLetter(record=dropped, reason=reason, kind="failed"))
