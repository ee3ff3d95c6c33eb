"""Time is passed in. Only this module reads the wall clock."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Protocol

from recsys.errors import BadInput

MAX_LEAD_MS = 60_000
"""Log time may lead its reader's wall clock by this much: half takes more of honest clocks for wrong ones, double lets a wrong
one hold windows open for longer."""


def bounded_ms(time_ms: int, wall_ms: int) -> int:
    """A log time that leads the wall clock by at most `MAX_LEAD_MS`, and is not before 1970."""
    return max(0, min(time_ms, wall_ms + MAX_LEAD_MS))


def iso_ms(text: str | None, field: str) -> int:
    """An ISO time to milliseconds; 0 for none. Without a zone it is UTC."""
    if text is None:
        return 0
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(
            f"{field} {text!r} is not an ISO time: write it like 2017-10-03T03:00:00Z", field=field
        ) from None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return round(when.timestamp() * 1000)


class Clock(Protocol):
    """Where the time comes from, in milliseconds since the epoch."""

    def now_ms(self) -> int: ...

    def monotonic_s(self) -> float:
        """Seconds since some instant, for what is due every so often: never goes back, whatever is done to the date."""
        ...


class SystemClock:
    """The wall clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is set: for tests and replay."""

    def __init__(self, now_ms: int = 0) -> None:
        self._now_ms = now_ms
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic_s(self) -> float:
        return self._now_ms / 1000

    def set(self, now_ms: int) -> None:
        with self._lock:
            self._now_ms = now_ms

    def advance(self, ms: int) -> None:
        with self._lock:
            self._now_ms += ms
