"""Processes take turns to compile, and none waits for ever for one that is stopped in its turn."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from recsys import compiled


def test_turns_are_taken_one_after_the_other() -> None:
    name, order = f"test-{os.getpid()}", []

    def turn(number: int) -> None:
        with compiled.one_at_a_time(name):
            order.append(number)
            time.sleep(0.1)
            order.append(number)

    threads = [threading.Thread(target=turn, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert order[::2] == order[1::2] and sorted(order[::2]) == [0, 1, 2]


def test_a_turn_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"test-held-{os.getpid()}"
    monkeypatch.setattr(compiled, "TURN_S", 0.2)
    with (Path(tempfile.gettempdir()) / f"recsys-{name}-{os.getuid()}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # by a process that somebody stopped
        began = time.monotonic()
        with compiled.one_at_a_time(name):
            assert 0.2 <= time.monotonic() - began < 10.0
