"""Forward decay (Cormode et al. 2009): what arrives later weighs more, so what is stored never has to be aged."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.errors import SnapshotCorrupt

logger = logging.getLogger("recsys")
_MAX_EXPONENT = 512
"""Half-lives after which stored sums are rescaled. float64 holds 1,023: half rescales twice as often, double overflows."""
_NEVER_MS = -(2**63)
"""Origin before the first weight, in saved state."""


class ForwardDecay:
    """Weights 2^((t - origin) / half-life - shift). Not thread-safe: its owner holds a lock.

    A sum of such weights, times `decay(now)`, is the exponentially decayed sum as of `now`; two sums never change their
    order by the mere passing of time. Times may come in any order, and from any year: what is counted years before the latest time
    adds 0, and what is read years before it is as of that time, so that nothing ever counts for more than it was.
    """

    def __init__(self, half_life_s: float, max_exponent: int = _MAX_EXPONENT) -> None:
        if not (half_life_s > 0 and math.isfinite(half_life_s)):
            raise ValueError(f"half_life_s must be positive and finite, got {half_life_s}")
        self.half_life_ms = half_life_s * 1000.0
        self._origin_ms: int | None = None
        self._shift = 0
        self._last_ms = 0
        self._max_exponent = max_exponent

    def _exponent(self, now_ms: int) -> float:
        assert self._origin_ms is not None
        return (now_ms - self._origin_ms) / self.half_life_ms - self._shift

    def weight(self, now_ms: int) -> float:
        """What 1 at `now_ms` adds to a stored sum. Only valid after `rescale` of that time or a later one."""
        return 2.0 ** min(self._exponent(now_ms), self._max_exponent)

    def decay(self, now_ms: int) -> float:
        """What a stored sum is multiplied by to be as of `now_ms`, or of the latest time counted (0 where that underflows)."""
        if self._origin_ms is None:
            return 0.0
        return 2.0 ** min(-self._exponent(max(now_ms, self._last_ms)), 1023.0)

    def rescale(self, now_ms: int) -> float | None:
        """Call before `weight`: None nearly always, else the power of two that every stored sum must be multiplied by."""
        if self._origin_ms is None:
            self._origin_ms = self._last_ms = now_ms
        elif now_ms > self._last_ms:
            self._last_ms = now_ms
        exponent = self._exponent(now_ms)
        if exponent <= self._max_exponent:
            return None
        step = math.floor(exponent)
        self._shift += step
        return math.ldexp(1.0, -step) if step < 1074 else 0.0

    def state(self) -> tuple[int, int, int]:
        """(origin, shift, latest time); origin is -2^63 before the first weight. To be saved beside the half-life."""
        return (_NEVER_MS if self._origin_ms is None else self._origin_ms), self._shift, self._last_ms

    def restore(
        self,
        state: Sequence[int],
        half_life_s: float | None = None,
        *,
        saved_ms: int | None = None,
        latest_ms: int | None = None,
    ) -> float:
        """Load `state`; what every stored sum must then be multiplied by: 1, unless it was saved with another half-life.

        A sum as of `saved_ms` (none: of the latest time counted) stays what it was; from then on it decays by this half-life. State of a
        clock that was ahead of `latest_ms` is brought back to it. Earlier versions saved no latest time: their last rescale stands in.
        """
        origin_ms, shift, *last = state
        if origin_ms == _NEVER_MS:
            return 1.0
        own_ms = self.half_life_ms
        saved = own_ms if half_life_s is None else half_life_s * 1000.0
        self._origin_ms, self._shift = origin_ms, shift
        self._last_ms = last[0] if last else origin_ms + int(shift * saved)
        if latest_ms is not None and self._last_ms > latest_ms:
            ahead_s = (self._last_ms - latest_ms) / 1000
            logger.warning("counts were saved by a clock that was ahead: their times are moved back by %.0f s", ahead_s)
            self._origin_ms -= self._last_ms - latest_ms
            self._last_ms = latest_ms
        if saved == own_ms:
            return 1.0
        logger.warning(
            "counts saved with a half-life of %g s are kept and halve every %g s now", saved / 1e3, own_ms / 1e3
        )
        self.half_life_ms = saved
        as_of_ms = max(self._last_ms, self._last_ms if saved_ms is None else saved_ms)
        factor = self.decay(as_of_ms)
        self.half_life_ms = own_ms
        self._origin_ms, self._shift, self._last_ms = as_of_ms, 0, as_of_ms
        return factor


def counted(sums: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
    """Sums as they were loaded; SnapshotCorrupt where one of them is no count."""
    if not (np.isfinite(sums).all() and (sums >= 0).all()):
        raise SnapshotCorrupt(f"{what} holds a count that is negative or not finite")
    return sums
