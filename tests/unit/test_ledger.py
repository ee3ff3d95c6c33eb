"""The trainer's ledger: what was held before a gap is still settled, or waits."""

from __future__ import annotations

from recsys.training.ledger import CARRIED, HELD, Ledger


def test_feedback_that_was_held_before_a_gap_is_accounted_for_after_it() -> None:
    ledger = Ledger(["click"])
    for offset in range(5):
        ledger.took("feedback/0", offset, HELD)
    ledger.settled["joined"] += 2  # of them; three wait
    ledger.passed_gap("feedback/0", 5, 100)
    ledger.took("feedback/0", 100, HELD)

    def waits() -> int:
        return sum(taken[HELD] for taken in ledger.records.values()) - sum(ledger.settled.values())

    assert waits() == 4 and ledger.settled[CARRIED] == -5 and ledger.gaps["feedback/0"] == 95
    ledger.settled["joined"] += 4
    assert waits() == 0
