"""What a loop does that found nothing: wait until something may have come."""

from __future__ import annotations

import time

from recsys.streams.base import Watch
from recsys.streams.watch import POLL_S
from services.common.process import Stop

NET_S = 0.25
"""An append that nobody told of is found so late; see `Watch`. Half asks twice as often for nothing, double answers without it for longer."""
TOGETHER_S = 0.005
"""What comes within is taken in one turn: half has up to twice as many turns, each with a fixed cost, double holds freshness back."""


class Rest:
    """The pauses of one loop."""

    def __init__(self, watch: Watch, stop: Stop) -> None:
        self._watch, self._stop = watch, stop
        self._rested_s, self._misses = 0.0, 0

    def found(self, something: bool) -> bool:
        """Whether a turn found something: then there may be more before long."""
        if something:
            self._misses = 0
        return something

    def __call__(self, timeout_s: float = NET_S) -> None:
        """Until something came, or `timeout_s`; two pauses end at least TOGETHER_S apart."""
        early_s = self._rested_s + TOGETHER_S - time.monotonic()
        if not (early_s > 0 and self._stop.wait(early_s)):
            self._watch.wait(timeout_s if self._watch.tells else min(timeout_s, POLL_S * self._misses))
        self._misses += 1
        self._rested_s = time.monotonic()
