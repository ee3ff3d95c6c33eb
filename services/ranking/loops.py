"""The threads of the ranking process: each takes turns, and rests where there was nothing to do, longer while nobody is there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from recsys.errors import LogError, LogTruncated, ParametersUnavailable, RecsysError, StateUnavailable
from services.common.process import Stop, logger
from services.common.trouble import Troubles

IDLE_S = 1.0
"""Between two turns of a loop while nobody is there: half costs a core .1% more a loop, double shows gauges that are twice as old."""
HERE_S = 2.0
"""So long after somebody was there they may come again: half slows down between two requests of a small site."""


class Idle:
    """Whether anything was asked or changed of late. Thread-safe."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._last_s = time.monotonic()
        self._somebody = threading.Event()

    def over(self) -> None:
        """Somebody is there: who waits goes on at once."""
        self._last_s = time.monotonic()
        self._somebody.set()

    def pause(self, seconds: float, busy: Callable[[], bool]) -> Callable[[], object]:
        """A pause of so many seconds; where nobody is there, and the loop is not `busy`, until somebody is, for IDLE_S at most."""

        def rest() -> None:
            self._somebody.clear()  # first: who comes from here on ends the wait
            if busy() or time.monotonic() - self._last_s < HERE_S:
                self._stop.wait(seconds)
            elif not self._stop:
                self._somebody.wait(IDLE_S)

        return rest


class Loops:
    """Threads that take turns until told to stop; what they cannot do is noted, and tried again."""

    def __init__(self, stop: Stop, trouble: Troubles) -> None:
        self._stop, self._trouble = stop, trouble
        self._threads: list[threading.Thread] = []

    def run(self, name: str, turn: Callable[[], bool], rest: Callable[[], object]) -> None:
        """Start one; it rests after a turn that left nothing."""
        thread = threading.Thread(target=self._loop, args=(name, turn, rest), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def seconds(self, seconds: float) -> Callable[[], object]:
        """A rest of always the same length."""
        return partial(self._stop.wait, seconds)

    def _loop(self, name: str, turn: Callable[[], bool], rest: Callable[[], object]) -> None:
        self._trouble.turned(name)
        while not self._stop:
            try:
                more = turn()
                self._trouble.turned(name)
            except (RecsysError, OSError) as error:
                again = isinstance(error, LogError | StateUnavailable | ParametersUnavailable)
                again &= not isinstance(error, LogTruncated)
                logger.log(logging.WARNING if again else logging.ERROR, "%s", error)
                self._trouble.note(name, error)
                more = False
                self._stop.wait(0.5 if again else 5.0)
            if not more:
                rest()

    def join(self) -> None:
        """They were told to stop: wait until they did."""
        for thread in self._threads:
            thread.join(timeout=5)
