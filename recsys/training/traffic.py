"""What users were shown and what they did, given to all who learn from it: joiner, towers, bandit, breaker and ledger."""

from __future__ import annotations

from recsys.errors import BadInput
from recsys.events.seen_ids import Kind, SeenIds
from recsys.features.build import decode
from recsys.features.convert import Conversions
from recsys.features.schema import Schema
from recsys.training import ledger
from recsys.training.bandit_learner import BanditLearner
from recsys.training.breaker import Breaker
from recsys.training.joiner import Joiner
from recsys.training.steps import HELD, POSITIVES, StepReport, blaming
from recsys.training.tower_learner import TowerLearner
from recsys.types import FORGET, Feedback, Impression


class Traffic:
    """Takes impressions and feedback, one by one, in order of arrival. Not thread-safe."""

    def __init__(
        self,
        schema: Schema,
        seen: SeenIds,
        joiner: Joiner,
        breaker: Breaker,
        counts: ledger.Ledger,
        towers: TowerLearner | None,
        bandit: BanditLearner | None,
    ) -> None:
        self._schema, self._seen, self._joiner = schema, seen, joiner
        self._breaker, self._ledger, self._towers, self._bandit = breaker, counts, towers, bandit
        self.conversions = Conversions({}, schema)
        """By which impressions are read that were written under a configuration of before."""

    def impression(self, impression: Impression, now_ms: int, report: StepReport) -> str:
        """Open an impression, and say what became of it; BadInput when it was written with another schema."""
        if impression.features and impression.schema != self._schema.hash:
            impression = self.conversions.impression(impression)
        if impression.features:
            shown = len(decode(self._schema, impression.features).item_keys)
            if shown != len(impression.items):
                raise BadInput(
                    f"features: of {shown} items, the impression shows {len(impression.items)}; write both of one answer",
                    field="features",
                )
        served = self._bandit.served(impression) if self._bandit else None  # before anything is changed
        self._ledger.items += len(impression.items)
        if self._seen.too_late(Kind.REQUEST, impression.time_ms, now_ms):
            report.count("impression_too_late")
            return "impression_too_late"
        held = [HELD + impression.request_id] if impression.request_id in self._joiner.held else []
        with blaming(lambda: held):
            outcome = self._joiner.impression(impression, now_ms)
        report.count("impression_" + outcome)
        if outcome == "opened":
            self._breaker.shown(len(impression.items), now_ms)
            self._ledger.opened(len(impression.items))
        if self._towers and outcome != "duplicate":
            self._towers.impression(impression)
        if self._bandit and served:
            self._bandit.impression(impression, served, now_ms, self._joiner.early)
        elif self._bandit:
            for _, feedback in self._joiner.early:
                self._bandit.never(feedback)
        return "impression_" + outcome

    def explored(self, impression: Impression, now_ms: int) -> None:
        """Let the bandit alone learn from an impression."""
        if self._bandit and (served := self._bandit.served(impression)):
            self._bandit.impression(impression, served, now_ms)

    def feedback(self, feedback: Feedback, now_ms: int, report: StepReport) -> str:
        """Join one feedback to what was shown, and say what became of it."""
        if feedback.type == FORGET:
            if self._towers:
                self._towers.forget(feedback.user_id)
            report.count("forget")
            return "forget"
        # A copy of what comes too late may have been learned: nobody remembers for so long.
        if self._seen.too_late(Kind.EVENT, feedback.time_ms, now_ms):
            report.count("too_late")
            return "too_late"
        self._breaker.arrived(feedback.type, now_ms)
        outcome = self._joiner.feedback(feedback, now_ms)
        if outcome != "early":  # counted once it is known what becomes of it
            report.count(outcome)
        if self._towers:
            with blaming(lambda: [POSITIVES]):
                learned = self._towers.feedback(feedback, now_ms)
            if not learned:
                report.skipped("two_tower")
        if self._bandit and outcome != "early":
            self._bandit.feedback(feedback, now_ms)
        return ledger.HELD if outcome == "early" else outcome
