"""The ids that one process saw of late: one store for all in it who must tell a first from a copy, or say what is too late for that."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from recsys.events.recent import HORIZON_MS, Recent, recent_limit
from recsys.types import Int64


class Kind(StrEnum):
    """What an id is of. The value names it in saved state."""

    EVENT = "seen"
    """Feedback that was read from the log."""
    REQUEST = "shown"
    """An impression that was read from the log."""
    POSITIVE = "positives"
    """A task's positive of an item of a request."""
    EXPLORED = "requests"
    """An impression that the bandit learned from."""
    ACCEPTED = "accepted"
    """Feedback that was appended to the log here."""
    LATE = "late"
    """The same of what happened long before: apart, so that an import of old events drives no new one's id out."""
    ANSWERED = "answered"
    """A request that was answered here."""
    PUT = "put"
    """An item that was appended to the log here, until it is read."""
    STORED = "stored"
    """Feedback that was read again for a store of user state that lost it."""


PUT_S = 60.0
"""An item accepted here is in the catalogue by then, or something else is wrong."""


class SeenIds:
    """Each kind apart: who fills one shortens no other's horizon. One writer a kind; any thread reads."""

    def __init__(self, memory_bytes: int = 0) -> None:
        """`memory_bytes`: the whole budget, of which ids have their share."""
        limit = recent_limit(memory_bytes)
        self._of = {kind: Recent(PUT_S if kind == Kind.PUT else HORIZON_MS / 1000, limit=limit) for kind in Kind}

    def first(self, kind: Kind, identity: str | int, now_ms: int) -> bool:
        """Whether the id (or its digest) was not seen within the horizon; then it is remembered."""
        return self._of[kind].add(identity, now_ms)

    def knows(self, kind: Kind, identity: str | int) -> bool:
        """Whether the id (or its digest) was seen within the horizon."""
        return self._of[kind].contains(identity)

    def too_late(self, kind: Kind, own_ms: int, now_ms: int) -> bool:
        """Whether what happened at `own_ms` may be a copy that nobody remembers: it happened before the horizon, which begins later
        where too many ids came."""
        return not self._of[kind].covers(own_ms, now_ms)

    @property
    def full_ratio(self) -> float:
        """How full the fullest kind is; at 1 its horizon gets shorter."""
        return max(recent.full_ratio for recent in self._of.values())

    def clear(self, *kinds: Kind) -> None:
        """Nothing of these was seen."""
        for kind in kinds:
            self._of[kind].clear()

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was seen ahead of `now_ms` was seen then."""
        for recent in self._of.values():
            recent.set_back(now_ms)

    def state(self, kind: Kind) -> dict[str, Int64]:
        """One kind, as arrays."""
        return self._of[kind].state()

    def restore(self, kind: Kind, state: Mapping[str, Int64]) -> None:
        """Load what `state` returned, also that of earlier versions."""
        self._of[kind].restore(state)
