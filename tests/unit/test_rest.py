"""The pauses of loops: short while something comes, long while nothing does, and never past what wakes them."""

from __future__ import annotations

import threading
import time

from recsys.clock import ManualClock
from recsys.streams.memory_log import MemoryLog
from recsys.streams.watch import POLL_S, SLOWEST_S
from services.common.process import Stop
from services.common.rest import NET_S, TOGETHER_S, Rest
from services.ranking.loops import IDLE_S, Idle


class Told:
    """Writes down how long it was to wait."""

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self.waits: list[float] = []

    def wait(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)


def test_a_log_that_tells_nobody_is_asked_less_and_less_until_something_comes() -> None:
    watch = Told(tells=False)
    rest = Rest(watch, Stop())
    for _ in range(15):
        rest()
    assert watch.waits[:3] == [0, POLL_S, 2 * POLL_S] and watch.waits[-1] >= SLOWEST_S
    assert not rest.found(False)
    rest()
    assert watch.waits[-1] >= SLOWEST_S and rest.found(True)
    rest()
    assert watch.waits[-1] == 0


def test_a_log_that_tells_is_waited_for_as_long_as_is_asked_for() -> None:
    watch = Told(tells=True)
    rest = Rest(watch, Stop())
    rest(), rest(0.01)
    assert watch.waits == [NET_S, 0.01]


def test_a_log_in_memory_tells_nobody() -> None:
    assert not MemoryLog(ManualClock(0)).watch(["feedback"]).tells


def test_pauses_are_apart_even_where_the_watch_returns_at_once() -> None:
    rest, started = Rest(Told(tells=True), Stop()), time.monotonic()
    for _ in range(11):
        rest()
    assert time.monotonic() - started >= 10 * TOGETHER_S


def test_who_comes_ends_the_long_pause_of_an_idle_loop() -> None:
    stop = Stop()
    idle = Idle(stop)
    idle._last_s -= 100
    rest = idle.pause(0.0, lambda: False)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (rest(), done.set()))
    waiting.start()
    while not done.wait(0.01):  # as often as it takes: the pause may not have begun yet
        idle.over()
    waiting.join()
    started = time.monotonic()
    rest()
    assert time.monotonic() - started < IDLE_S, "somebody was there just now"


def test_a_busy_loop_does_not_fall_asleep() -> None:
    idle = Idle(Stop())
    idle._last_s -= 100
    started = time.monotonic()
    idle.pause(0.001, lambda: True)()
    assert time.monotonic() - started < IDLE_S
