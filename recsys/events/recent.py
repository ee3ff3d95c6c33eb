"""Which ids were seen of late: exact within a horizon of log time, in bounded memory."""

from __future__ import annotations

import hashlib

import numpy as np

from recsys.types import Int64


class Recent:
    """A set of 8-byte id digests in generations of log time; ids older than the horizon are forgotten, a generation at a time."""

    def __init__(self, horizon_s: float = 3600.0, generations: int = 6) -> None:
        self._step_ms = int(horizon_s * 1000 / generations)
        self._generations: dict[int, set[int]] = {}
        self._keep = generations + 1

    def add(self, identity: str, now_ms: int) -> bool:
        """True when the id is new within the horizon; it is then remembered."""
        digest = _digest(identity)
        if any(digest in generation for generation in self._generations.values()):
            return False
        current = now_ms // self._step_ms
        if current not in self._generations:
            self._generations[current] = set()
            for old in [g for g in self._generations if g <= current - self._keep]:
                del self._generations[old]
        self._generations[current].add(digest)
        return True

    def contains(self, identity: str) -> bool:
        """Whether the id was added within the horizon."""
        digest = _digest(identity)
        return any(digest in generation for generation in self._generations.values())

    def oldest_ms(self, now_ms: int) -> int:
        """Records older than this cannot be told from duplicates any more."""
        return now_ms - self._step_ms * (self._keep - 1)

    def state(self) -> dict[str, Int64]:
        """Digests and their generations, as arrays."""
        items = sorted(self._generations.items())
        digests = [np.array(sorted(generation), np.int64) for _, generation in items]
        return {
            "generation": np.repeat(np.array([g for g, _ in items], np.int64), [len(d) for d in digests]),
            "digest": np.concatenate(digests) if digests else np.zeros(0, np.int64),
        }

    def restore(self, state: dict[str, Int64]) -> None:
        self._generations = {
            int(g): set(state["digest"][state["generation"] == g].tolist()) for g in np.unique(state["generation"])
        }


def _digest(identity: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )
