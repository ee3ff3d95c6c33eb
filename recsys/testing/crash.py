"""Scripted crashes inside one process: everything in memory is to be thrown away, what is on disk stays."""

from __future__ import annotations


class Abort(Exception):
    """A crash at a named gap."""


class AbortAt:
    """Raises Abort when `gap` is passed for the `count`-th time; to be passed where a part takes `crash`."""

    def __init__(self, gap: str, count: int = 1) -> None:
        self._gap, self._left = gap, count

    def __call__(self, gap: str) -> None:
        if gap == self._gap:
            self._left -= 1
            if self._left == 0:
                raise Abort(gap)
