"""Dead letters of the trainer's steps: said, counted, and appended to the log."""

from __future__ import annotations

import logging

from recsys import metrics
from recsys.events.dead_letters import letter as dead_letter
from recsys.streams.base import EventLog
from recsys.training.steps import StepReport

logger = logging.getLogger("recsys")


class Letters:
    """What was buried and is not in the log yet. A letter may come twice after a crash, under the same key."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._unsent: list[tuple[str, bytes]] = []

    def bury(self, report: StepReport) -> None:
        """Append a step's dead letters, after those that wait."""
        for letter in report.dead_letters:
            key, value = dead_letter(letter.record, letter.reason)
            metrics.DEAD_LETTERS.labels(letter.record.topic, letter.kind).inc()
            logger.warning("dead letter %s: %s", key, letter.reason)
            self._unsent.append((key, value))
        self.send()

    def send(self) -> None:
        """Append what waits; when the log is full it waits on, and learning with it."""
        if self._unsent:
            self._log.append("dead_letter", self._unsent)
            self._unsent = []
