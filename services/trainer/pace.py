"""When the trainer's next step is due: each has a fixed cost of some 3 ms, whatever it learns."""

from __future__ import annotations

import time

from services.common.process import Stop

STEP_S = 0.25
"""Steps begin at least this far apart while they are small: half costs nearly twice as much where little comes, double holds what was
learned back for longer."""
STEP_RECORDS = 256
"""Behind a step of so many records there may be more: the next one follows at once."""


class Pace:
    """Holds the next step back until there is enough for it. What comes after a pause is learned at once."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._began_s, self._position = 0.0, 0

    def begin(self, position: int) -> None:
        """A step may begin; `position`: records read before it."""
        self._began_s, self._position = time.monotonic(), position

    def hold(self, position: int) -> None:
        """A step ended, `position` records have been read now: wait until the next one is due, or until told to stop."""
        left_s = self._began_s + STEP_S - time.monotonic()
        if left_s > 0 and position - self._position < STEP_RECORDS:
            self._stop.wait(left_s)
