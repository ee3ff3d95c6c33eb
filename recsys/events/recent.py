"""Which ids were seen of late: exact within a horizon of log time, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from recsys.capacity import entries
from recsys.types import Int64

HORIZON_MS = 3_600_000
"""Copies are known by their ids for this long. What happened before it, by its own time, is `too_late`: it may be a copy."""
_BYTES_EACH = 100
"""Of one digest: an int in a set that is, on average, half full."""
_SETS = 10
"""Of one process that share the bound: ranking has accepted, late and answered ids, and counts events, requests and positives; it limits
what one user counts for by two maps, whose entries take twice as much."""


def recent_limit(memory_bytes: int) -> int:
    """Ids that one set may hold, of `capacity.memory_bytes`."""
    return entries(memory_bytes, "digests", _BYTES_EACH * _SETS)


class _Generation:
    __slots__ = ("digests", "first_ms")

    def __init__(self, first_ms: int, digests: set[int]) -> None:
        self.first_ms, self.digests = first_ms, digests


class Recent:
    """A set of 8-byte id digests in generations of log time; ids older than the horizon are forgotten, a generation at a time.

    Of more than `limit` the oldest generation is forgotten early, and the horizon begins after it. One writer; any thread reads.
    """

    def __init__(self, horizon_s: float = HORIZON_MS / 1000, generations: int = 6, limit: int = 2**40) -> None:
        self._horizon_ms = int(horizon_s * 1000)
        self._step_ms = self._horizon_ms // generations
        self._keep = generations + 1
        self._limit = limit
        self._generations: tuple[_Generation, ...] = ()
        self._forgotten_ms = 0

    def clear(self) -> None:
        """Forget all, and that anything was forgotten early."""
        self._generations, self._forgotten_ms = (), 0

    def __len__(self) -> int:
        return sum(len(generation.digests) for generation in self._generations)

    @property
    def full_ratio(self) -> float:
        """How full it is; at 1 the horizon gets shorter."""
        return len(self) / self._limit

    def add(self, identity: str | int, now_ms: int) -> bool:
        """True when the id (or its digest) is new within the horizon; it is then remembered."""
        digest = identity if isinstance(identity, int) else digest_of(identity)
        if self._has(digest):
            return False
        self._current(now_ms).add(digest)
        return True

    def contains(self, identity: str | int) -> bool:
        """Whether the id (or its digest) was added within the horizon."""
        return self._has(identity if isinstance(identity, int) else digest_of(identity))

    def _has(self, digest: int) -> bool:
        for generation in self._generations:  # noqa: SIM110 - a generator costs more than all the look-ups
            if digest in generation.digests:
                return True
        return False

    def _current(self, now_ms: int) -> set[int]:
        """The newest generation; where log time went back it takes what comes, which is then kept longer than need be."""
        generations, step_ms = self._generations, self._step_ms
        if generations:
            newest = generations[-1]
            if now_ms // step_ms <= newest.first_ms // step_ms and len(newest.digests) * self._keep < self._limit:
                return newest.digests
            now_ms = max(now_ms, newest.first_ms)
        newest = _Generation(now_ms, set())
        kept = [old for old in generations if now_ms // step_ms - old.first_ms // step_ms < self._keep]
        while sum(len(old.digests) for old in kept) * self._keep > self._limit * (self._keep - 1):
            del kept[0]
            self._forgotten_ms = kept[0].first_ms if kept else now_ms
        self._generations = (*kept, newest)
        return newest.digests

    def covers(self, own_ms: int, now_ms: int) -> bool:
        """Whether a copy of what happened at `own_ms` would be known now: what came earlier than the horizon is told from nothing."""
        return own_ms >= max(now_ms - self._horizon_ms, self._forgotten_ms)

    def state(self) -> dict[str, Int64]:
        """Digests and their generations, as arrays; and before when ids were forgotten early."""
        numbers = np.array([old.first_ms // self._step_ms for old in self._generations], np.int64)
        sets = [np.fromiter(old.digests, np.int64, len(old.digests)) for old in self._generations]
        return {
            "generation": np.repeat(numbers, [len(digests) for digests in sets]),
            "digest": np.concatenate([np.zeros(0, np.int64), *map(np.sort, sets)]),
            "forgotten": np.array([self._forgotten_ms], np.int64),
        }

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was added ahead of `now_ms` was added then. The horizon must not begin in a time to come."""
        for generation in self._generations:
            generation.first_ms = min(generation.first_ms, now_ms)
        self._forgotten_ms = min(self._forgotten_ms, now_ms)

    def restore(self, state: Mapping[str, Int64]) -> None:
        """Load `state`, also that of a version that forgot nothing early."""
        self._generations = tuple(
            _Generation(int(g) * self._step_ms, set(state["digest"][state["generation"] == g].tolist()))
            for g in np.unique(state["generation"])
        )
        self._forgotten_ms = int(state["forgotten"][0]) if "forgotten" in state else 0


def digest_of(identity: str) -> int:
    """What is kept of an id: where several sets are asked, it is computed once."""
    return int.from_bytes(
        hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )
