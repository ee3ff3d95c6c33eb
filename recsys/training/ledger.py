"""What became of every record that the trainer took, and of every label: part of its state, counted where it happens.

`recsys audit` compares it with what the log holds, what still waits and what was published: each counts for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from recsys.types import Bool

DEAD, HELD = "dead_lettered", "held"
"""Outcomes of a record: kept in the dead letters; waiting for its impression, which `settled` ends."""
POSITIVE, NEGATIVE, MASKED, UNLEARNED, DROPPED, CARRIED = (
    "positive",
    "negative",
    "masked",
    "unlearned",
    "dropped",
    "carried",
)
"""What became of a label: learned as 1 or 0; its item was not shown; `resume --skip` went past it; a step failed with it. `carried`: it
waited when the ledger began."""


class Ledger:
    """Counts by partition ("topic/partition"). Not thread-safe."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self.since: dict[str, int] = {}
        """First offset of each partition that is counted."""
        self.records: dict[str, Counter[str]] = {}
        """Records by outcome."""
        self.items = 0
        """Items of all impressions that could be read, whatever became of these."""
        self.settled: Counter[str] = Counter()
        """What became of held feedback."""
        self.labels: dict[str, Counter[str]] = {task: Counter() for task in self._tasks}
        """By task; `opened`: labels of impressions that were opened."""
        self.gaps: Counter[str] = Counter()
        """Offsets that an accepted gap went past."""

    def took(self, place: str, offset: int, outcome: str) -> None:
        """One record of a partition."""
        self.since.setdefault(place, offset)
        self.records.setdefault(place, Counter())[outcome] += 1

    def opened(self, items: int) -> None:
        """An impression of so many items was opened: as many labels of each task will be final."""
        for labels in self.labels.values():
            labels["opened"] += items

    def final(self, labels: Bool, final: Bool, shown: Bool, *, learned: bool) -> None:
        """Labels [K, T] of which some are final now, of items of which some were shown [K]."""
        counted = final & shown[:, None]
        sums = (counted & labels).sum(0), (counted & ~labels).sum(0), (final & ~shown[:, None]).sum(0)
        for task, positive, negative, masked in zip(self._tasks, *(part.tolist() for part in sums), strict=True):
            ledger = self.labels[task]
            if learned:
                ledger[POSITIVE] += positive
                ledger[NEGATIVE] += negative
            else:
                ledger[UNLEARNED] += positive + negative
            ledger[MASKED] += masked

    def lost(self, waiting: Mapping[str, int], outcome: str = DROPPED) -> None:
        """Labels by task that a failing step gave up, or `resume --skip`."""
        for task, count in waiting.items():
            self.labels[task][outcome] += count

    def begin(self, waiting: Mapping[str, int], held: int) -> None:
        """Begin with what waits already: labels by task, and feedback."""
        for task, count in waiting.items():
            self.labels[task][CARRIED] += count
        self.settled[CARRIED] -= held

    def passed_gap(self, place: str, position: int, next_position: int) -> None:
        """What the log lost before `next_position` is not to be had: the partition is counted anew from there."""
        self.gaps[place] += max(0, next_position - position)
        self.settled[CARRIED] -= self.records.get(place, Counter())[HELD]
        self.since[place] = next_position
        self.records[place] = Counter()

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        return {
            "since": dict(self.since),
            "records": {place: dict(counts) for place, counts in self.records.items()},
            "items": self.items,
            "settled": dict(self.settled),
            "labels": {task: dict(counts) for task, counts in self.labels.items()},
            "gaps": dict(self.gaps),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load `state`."""
        self.since = dict(state["since"])
        self.records = {place: Counter(counts) for place, counts in state["records"].items()}
        self.items = state["items"]
        self.settled = Counter(state["settled"])
        self.labels = {task: Counter(state["labels"].get(task, {})) for task in self._tasks}
        self.gaps = Counter(state["gaps"])


def waiting_of(labels: Mapping[str, int]) -> int:
    """Labels of a task in a ledger that did not become final yet."""
    ended = (POSITIVE, NEGATIVE, MASKED, UNLEARNED, DROPPED)
    return labels.get("opened", 0) + labels.get(CARRIED, 0) - sum(labels.get(name, 0) for name in ended)
