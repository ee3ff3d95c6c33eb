"""A step that failed: what made it fail is found, and the step is run again without it.

Units of a step are its records and what it closes (`Units.of`). An attempt runs the step on the state of before it,
without some of them; only the last attempt's state stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recsys.errors import StepFailed
from recsys.training.journal import Entry

ONE_BY_ONE = 8
"""Culprits of one step that are found singly; then all that raised leave at once: half may bury what failed only because of
another, double takes twice as long."""

Fails = Callable[[Entry], StepFailed | None]
"""Runs a step on the state of before it; what it failed with."""


def without_culprits(
    entry: Entry, failure: StepFailed, fails: Fails, everything: Callable[[Entry], Sequence[str]]
) -> Entry:
    """The step without one more unit, or several, because of which it failed. StepFailed when it fails without all of them, too."""
    suspects = [unit for unit in failure.suspects if unit not in entry.without]
    if not suspects:
        suspects = [unit for unit in everything(entry) if unit not in entry.without]
        still = fails(entry.leaving_out(dict.fromkeys(suspects, str(failure))))
        if still is not None:
            raise StepFailed(
                f"step {entry.step} fails even without its records, and nothing of it was kept: {still}; go back to the release or "
                "configuration that ran before, or move the folder `trainer` away to learn anew from what the log holds"
            ) from still
    found = [_culprit(entry, suspects, str(failure), fails)]
    if len(entry.without) >= ONE_BY_ONE:
        found += failure.others
    return entry.leaving_out(dict.fromkeys(found, str(failure)))


def _culprit(entry: Entry, suspects: Sequence[str], reason: str, fails: Fails) -> str:
    """One of the suspects because of which the step fails, found by halving."""
    while len(suspects) > 1:
        half, rest = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        without = entry.leaving_out(dict.fromkeys(half, reason))
        failure = fails(without)
        if failure is None:
            suspects = half
        else:  # one is in the rest; there may be others in the half, which stay out while that one is looked for
            entry = without
            suspects = [unit for unit in rest if unit in failure.suspects] or rest
    return suspects[0]
