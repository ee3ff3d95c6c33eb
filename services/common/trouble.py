"""What the loops of a process could not do, since when, and what of it makes the process not ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from recsys.errors import LogTruncated

STUCK_S = 30.0
"""A reader that could not go on for so long is not ready: half would say so at each restart of a broker or of Redis."""


class Troubles:
    """The last error of each loop by name. Written by the loops' threads, read by anyone."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._found: dict[str, tuple[float, Exception]] = {}

    def note(self, name: str, error: Exception) -> None:
        since_s, _ = self._found.get(name, (self._now_s(), error))
        self._found[name] = since_s, error

    def clear(self, name: str) -> None:
        self._found.pop(name, None)

    def of(self, name: str) -> str:
        """What stops this loop at the moment; empty when nothing does."""
        found = self._found.get(name)
        return str(found[1]) if found else ""

    def lasting(self, names: Iterable[str]) -> str:
        """What stops one of these loops for good (a gap in its log), or for longer than a restart of somebody else takes."""
        for name in names:
            if (found := self._found.get(name)) is not None:
                since_s, error = found
                waited_s = self._now_s() - since_s
                if isinstance(error, LogTruncated):
                    return str(error)
                if waited_s > STUCK_S:
                    return f"{error} (for {waited_s:.0f} s)"
        return ""
