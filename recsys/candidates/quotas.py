"""How many candidates each source may bring: as configured, or following how often what it brought was acted upon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recsys.decay import ForwardDecay

_HALF_LIFE_S = 86_400.0
_PRIOR = 200.0
"""Shown items' worth of the overall rate in each source's: half follows noise, double takes a day of a quiet source."""
_LEAST, _MOST = 0.5, 2.0
"""Of the configured quota, before all are scaled to the configured sum: a source that is bad today must stay visible to become good."""


class Quotas:
    """Not thread-safe: its owner holds a lock. Learned rates are this process's own and start anew with it."""

    def __init__(self, configured: Mapping[str, int], *, learn: bool) -> None:
        self._configured = {name: quota for name, quota in configured.items() if quota}
        self._learn = learn
        self._decay = ForwardDecay(_HALF_LIFE_S)
        self._shown = dict.fromkeys(self._configured, 0.0)
        self._acted = dict.fromkeys(self._configured, 0.0)

    def shown(self, sources: Sequence[str], now_ms: int) -> None:
        """An item that these sources brought was shown; it counts for them in equal parts."""
        if self._learn:
            self._add(self._shown, sources, now_ms)

    def acted(self, sources: Sequence[str], now_ms: int) -> None:
        """The first action on a shown item that these sources brought; no source: it is none."""
        if self._learn:
            self._add(self._acted, sources, now_ms)

    def _add(self, sums: dict[str, float], sources: Sequence[str], now_ms: int) -> None:
        if (factor := self._decay.rescale(now_ms)) is not None:
            for every in (self._shown, self._acted):
                for name in every:
                    every[name] *= factor
        for name in sources:
            if name in sums:
                sums[name] += self._decay.weight(now_ms) / len(sources)

    def current(self, now_ms: int) -> dict[str, int]:
        """Most candidates of each source. Learned: in proportion to quota × rate, within half and twice of it, of the same sum."""
        acted, shown, decay = sum(self._acted.values()), sum(self._shown.values()), self._decay.decay(now_ms)
        if not self._learn or not acted or not shown:
            return dict(self._configured)
        overall = acted / shown
        weights = {}
        for name, quota in self._configured.items():
            rate = (self._acted[name] * decay + _PRIOR * overall) / (self._shown[name] * decay + _PRIOR)
            weights[name] = quota * min(_MOST, max(_LEAST, rate / overall))
        scale = sum(self._configured.values()) / sum(weights.values())
        return {name: max(1, round(weight * scale)) for name, weight in weights.items()}
