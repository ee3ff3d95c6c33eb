"""How many candidates each source may bring: as configured, or following how often what it brought was acted upon."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from recsys.decay import ForwardDecay

_HALF_LIFE_S = 86_400.0
_PRIOR = 200.0
"""Shown items' worth of the overall rate in each source's: half follows noise, double takes a day of a quiet source."""
_LEAST, _MOST = 0.5, 2.0
"""Of the configured quota, before all are scaled to the configured sum: a source that is bad today must stay visible to become good."""
_OPEN = 5_000
"""Requests whose actions are waited for, the latest: about 3 KB each."""


class Quotas:
    """Not thread-safe: its owner holds a lock. Learned rates are this process's own and start anew with it."""

    def __init__(self, configured: Mapping[str, int], *, learn: bool) -> None:
        self._configured = {name: quota for name, quota in configured.items() if quota}
        self._learn = learn
        self._decay = ForwardDecay(_HALF_LIFE_S)
        self._shown = dict.fromkeys(self._configured, 0.0)
        self._acted = dict.fromkeys(self._configured, 0.0)
        self._open: OrderedDict[str, dict[str, tuple[str, ...]]] = OrderedDict()
        self._unseen: OrderedDict[str, dict[str, tuple[str, ...]]] = OrderedDict()
        """Of deferred requests: items that were not viewed yet."""

    def shown(
        self, request_id: str, items: Iterable[tuple[str, tuple[str, ...]]], now_ms: int, *, deferred: bool = False
    ) -> None:
        """A request showed items, (id, sources) each, or (deferred) will have shown those that are viewed; an item counts for its sources
        in equal parts."""
        if not self._learn:
            return
        opened, unseen = ({}, dict(items)) if deferred else (dict(items), {})
        for requests, mine in ((self._open, opened), (self._unseen, unseen)):
            if mine or requests is self._open:
                requests[request_id] = mine
            if len(requests) > _OPEN:
                requests.popitem(last=False)
        for sources in opened.values():
            self._add(self._shown, sources, now_ms)

    def viewed(self, request_id: str | None, item_id: str, now_ms: int) -> None:
        """An item of a deferred request was viewed; the first time it counts as shown."""
        if request_id is None or request_id not in self._open:
            return
        if sources := self._unseen.get(request_id, {}).pop(item_id, ()):
            self._open[request_id][item_id] = sources
            self._add(self._shown, sources, now_ms)

    def acted(self, request_id: str | None, item_id: str, now_ms: int) -> None:
        """The first action on a shown item; others, and those on items that were not shown, do not count."""
        if self._learn and request_id is not None:
            self._add(self._acted, self._open.get(request_id, {}).pop(item_id, ()), now_ms)

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
