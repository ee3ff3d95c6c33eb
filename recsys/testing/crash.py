"""Scripted crashes: a process that kills itself at a named gap."""

from __future__ import annotations

import os
import signal


class Crash:
    """Kills its process with SIGKILL when `gap` is passed for the `count`-th time; counts every gap it saw."""

    def __init__(self, gap: str, count: int = 1) -> None:
        self._gap, self._left = gap, count

    def __call__(self, gap: str) -> None:
        if gap == self._gap:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Abort(Exception):
    """A crash inside one process: everything in memory is to be thrown away."""


class AbortAt:
    """Raises Abort when `gap` is passed for the `count`-th time."""

    def __init__(self, gap: str, count: int = 1) -> None:
        self._gap, self._left = gap, count

    def __call__(self, gap: str) -> None:
        if gap == self._gap:
            self._left -= 1
            if self._left == 0:
                raise Abort(gap)
