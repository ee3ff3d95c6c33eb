"""Forward decay (Cormode et al. 2009): what arrives later weighs more, so what is stored never has to be aged."""

from __future__ import annotations

import math

_MAX_EXPONENT = 512
"""Half-lives after which stored sums are rescaled. float64 holds 1,023: half rescales twice as often, double overflows."""


class ForwardDecay:
    """Weights 2^((t - origin) / half-life - shift). Not thread-safe: its owner holds a lock.

    A sum of such weights, times `decay(now)`, is the exponentially decayed sum as of `now`; two sums never change their
    order by the mere passing of time. Times may come in any order.
    """

    def __init__(self, half_life_s: float, max_exponent: int = _MAX_EXPONENT) -> None:
        if not (half_life_s > 0 and math.isfinite(half_life_s)):
            raise ValueError(f"half_life_s must be positive and finite, got {half_life_s}")
        self.half_life_ms = half_life_s * 1000.0
        self._origin_ms: int | None = None
        self._shift = 0
        self._max_exponent = max_exponent

    def weight(self, now_ms: int) -> float:
        """What 1 at `now_ms` adds to a stored sum. Only valid after `rescale(now_ms)`."""
        assert self._origin_ms is not None
        return 2.0 ** ((now_ms - self._origin_ms) / self.half_life_ms - self._shift)

    def decay(self, now_ms: int) -> float:
        """What a stored sum is multiplied by to be as of `now_ms` (0 where that underflows)."""
        if self._origin_ms is None:
            return 0.0
        exponent = self._shift - (now_ms - self._origin_ms) / self.half_life_ms
        return 2.0 ** min(exponent, 1023.0) if exponent > -1074 else 0.0

    def rescale(self, now_ms: int) -> float | None:
        """Call before `weight`: None nearly always, else the power of two that every stored sum must be multiplied by."""
        if self._origin_ms is None:
            self._origin_ms = now_ms
        exponent = (now_ms - self._origin_ms) / self.half_life_ms - self._shift
        if exponent <= self._max_exponent:
            return None
        step = math.floor(exponent)
        self._shift += step
        return math.ldexp(1.0, -step) if step < 1074 else 0.0

    def state(self) -> tuple[int, int]:
        """(origin, shift); origin is -2^63 before the first weight."""
        return (-(2**63) if self._origin_ms is None else self._origin_ms), self._shift

    def restore(self, origin_ms: int, shift: int) -> None:
        self._origin_ms = None if origin_ms == -(2**63) else origin_ms
        self._shift = shift
