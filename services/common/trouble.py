"""What the loops of a process could not do, since when, and what of it makes the process not ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from recsys.errors import LogTruncated
from recsys.streams.base import STUCK_S


class Troubles:
    """The last turn and the last error of each loop by name. Written by the loops' threads, read by anyone."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._turned_s: dict[str, float] = {}
        self._found: dict[str, Exception] = {}

    def turned(self, name: str) -> None:
        """A turn was finished without an error, or the first begins."""
        self._found.pop(name, None)
        self._turned_s[name] = self._now_s()

    def note(self, name: str, error: Exception) -> None:
        """A turn failed."""
        self._turned_s.setdefault(name, self._now_s())
        self._found[name] = error

    def of(self, name: str) -> str:
        """What stops this loop at the moment; empty when nothing does."""
        return str(self._found.get(name, ""))

    def waited_s(self, name: str) -> float:
        """Seconds since a turn of this loop was finished."""
        return self._now_s() - self._turned_s.get(name, self._now_s())

    def lasting(self, names: Iterable[str]) -> str:
        """What stops one of these loops for good (a gap in its log), or for longer than `STUCK_S`, with an error or without."""
        for name in names:
            error = self._found.get(name)
            if isinstance(error, LogTruncated):
                return str(error)
            waited_s = self.waited_s(name)
            if waited_s > STUCK_S:
                why = (
                    error
                    or f"{name}: nothing of it was finished; see the log of this process, and of what it waits for"
                )
                return f"{why} (for {waited_s:.0f} s)"
        return ""
