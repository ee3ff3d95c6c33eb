"""The bandit, learning: impressions and rewards of logged requests become sums on edges, user vectors become clusters.

An edge is a row of the table `edge`: slot = the cluster's place, key = the item's, values d = Σ w², n = Σ w (added when the
item counts as shown) and b = Σ w r (added when it is rewarded), w being the cluster's weight as served. A sum does not care
for order, batch or who adds it. With a half-life, what is added at log time t weighs 2^(t / half-life) (forward decay), by
the impression's time, so that a late reward weighs as much as what it rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.clusters import Clusters, Drop, Split
from recsys.bandit.served import Served, UInt64, decode
from recsys.capacity import bound_bytes
from recsys.config import Config
from recsys.decay import ForwardDecay
from recsys.errors import BadInput
from recsys.events.open_requests import OpenRequests
from recsys.events.seen_ids import Kind, SeenIds
from recsys.keys import joined, key_of, split
from recsys.table.base import Rows, Table
from recsys.table.fit import restore_within
from recsys.training.held import Early
from recsys.types import Feedback, Float32, Impression, Int32, Int64, UInt8

Arrays = dict[str, npt.NDArray[Any]]
logger = logging.getLogger("recsys")
MAX_EXPONENT = 64
"""Half-lives after which all edges are rescaled: float32 holds 127, and a sum may be large itself."""
SHOWN, REWARDED = 1, 2
"""Bits of what became of an item of an open impression."""
CURSOR = "edges of a place"
_VIEW = "view"


@dataclass(slots=True)
class _Open:
    """An impression that may still be rewarded: its active clusters [K], their weights, its items' keys [N] and edges [N]."""

    time_ms: int
    clusters: Int64
    weights: Float32
    keys: Int64
    edges: UInt64
    became: UInt8
    num_bytes: int
    """What it takes of the bound."""


_Due = tuple[_Open, Int64, int]
"""Items (by number) of an impression that count as shown, or as rewarded."""


class BanditLearner:
    """Pure: everything is decided by the records and the log times passed in. Not thread-safe."""

    def __init__(self, config: Config, tables: Mapping[str, Table], seen: SeenIds | None = None) -> None:
        """`seen`: what the process saw, in which this one remembers the requests that it learned from."""
        bandit = config.bandit
        self._table: Table = tables["edge"]
        self._dim = config.model.tower_dim
        self.clusters = Clusters(self._dim, bandit.clusters)
        self._decay = ForwardDecay(bandit.half_life_s, MAX_EXPONENT) if bandit.half_life_s else None
        self._rewards, self._window_ms = set(bandit.reward_types), int(bandit.reward_window_s * 1000)
        memory_bytes = config.capacity.memory_bytes
        self._seen = seen or SeenIds(memory_bytes)
        self._open = OpenRequests[_Open](bound_bytes(memory_bytes, "open") // 4)
        self._due: list[_Due] = []
        """Since the last step."""
        self._outcomes: list[str] = []
        self._now_ms = 0
        self.moved = False
        """Clusters were split or dropped, or sums rescaled, and nobody was told yet."""

    def served(self, impression: Impression) -> Served | None:
        """What an impression says of the bandit; BadInput for what it cannot mean."""
        if not impression.bandit:
            return None
        served = decode(impression.bandit, len(impression.items))
        if len(served.vector) != self._dim:
            raise BadInput(
                f"bandit has a user vector of {len(served.vector)}, model.tower_dim is {self._dim}: restart ranking and trainer with "
                "one configuration",
                field="bandit",
            )
        return served

    def impression(self, message: Impression, served: Served, now_ms: int, early: Sequence[Early] = ()) -> None:
        """Learn the user's vector; count edges shown, and open them for rewards, those of `early` feedback among them. A duplicate
        does nothing; where there is no room edges do not count as shown either: they could not be rewarded."""
        if not self._seen.first(Kind.EXPLORED, message.request_id, now_ms):
            return
        self.clusters.add(served.vector, served.generation, served.clusters)
        with_edge = np.flatnonzero(served.edges)
        opened = _Open(
            time_ms=now_ms,
            clusters=served.clusters,
            weights=served.weights,
            keys=np.array([key_of(message.items[index].item_id) for index in with_edge.tolist()], np.int64),
            edges=served.edges[with_edge],
            became=np.zeros(len(with_edge), np.uint8),
            num_bytes=_bytes_of(message.request_id, len(served.clusters), len(with_edge)),
        )
        if not self._open.has_room(opened.num_bytes):
            for _, feedback in early:
                self._settle(feedback.type, "no_room")
            return
        self._open.add(message.request_id, opened)
        if message.activation != "deferred":
            opened.became[:] = SHOWN
            self._due.append((opened, np.arange(len(with_edge)), SHOWN))
        for at_ms, feedback in early:
            self.feedback(feedback, max(at_ms, now_ms))

    def feedback(self, message: Feedback, now_ms: int) -> None:
        """Reward an item, or count it as shown (`view`, where that was deferred). Who calls holds what comes ahead of its impression."""
        if message.request_id is None or not (message.type in self._rewards or message.type == _VIEW):
            return
        opened, key = self._open.get(message.request_id), key_of(message.item_id)
        if opened is not None:
            self._happened(opened, key, message.type, now_ms)
        elif self._seen.knows(Kind.EXPLORED, message.request_id):
            self._settle(message.type, "too_late")
        else:
            self._settle(message.type, "no_impression")

    def _happened(self, opened: _Open, key: int, kind: str, now_ms: int) -> None:
        at = np.flatnonzero(opened.keys == key)
        if now_ms - opened.time_ms > self._window_ms:
            self._settle(kind, "too_late")
        elif not len(at):
            self._settle(kind, "no_edge")
        elif kind in self._rewards:
            self._settle(kind, "duplicate" if opened.became[at[0]] & REWARDED else "rewarded")
            self._becomes(opened, at, REWARDED)
        else:
            self._becomes(opened, at, SHOWN)

    def _becomes(self, opened: _Open, at: Int64, what: int) -> None:
        """A reward of an item that does not count as shown yet waits until it does."""
        before = int(opened.became[at[0]])
        opened.became[at[0]] |= what
        for bit in (SHOWN, REWARDED):
            ready = before | what
            if ready & SHOWN and ready & bit and not (before & SHOWN and before & bit):
                self._due.append((opened, at, bit))

    def never(self, feedback: Feedback) -> None:
        """It waited for its impression in vain."""
        self._settle(feedback.type, "no_impression")

    @property
    def full_ratio(self) -> float:
        """How full the room for open impressions is."""
        return self._open.full_ratio

    def _settle(self, kind: str, outcome: str) -> None:
        if kind in self._rewards:
            self._outcomes.append(outcome)

    def take_outcomes(self) -> list[str]:
        """What became of each reward since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was opened ahead of `now_ms`, and the edges' sums, are as of then."""
        self._open.set_back(now_ms)
        self._now_ms = min(self._now_ms, now_ms)
        if self._decay is not None:
            self._decay.restore(self._decay.state(), latest_ms=now_ms)
            self.moved = True

    def drop_due(self) -> None:
        """Forget what would be added to edges in the next step."""
        self._due = []

    def step(self, now_ms: int, learn: bool) -> None:
        """Add up what is due, forget impressions that cannot be rewarded any more, split and drop clusters."""
        due, self._due = self._due, []
        self._now_ms = max(self._now_ms, now_ms)
        if self._decay is not None and (factor := self._decay.rescale(now_ms)) is not None:
            self._rescale(factor)
        if due and learn:
            self._add(due, now_ms)
        self._open.drop_before(now_ms - self._window_ms)
        for change in self.clusters.step():
            self._follow(change)

    def _add(self, due: Sequence[_Due], now_ms: int) -> None:
        """All edges of a step in one update: what several impressions add to an edge is summed first, in float64. An edge that
        is shown and rewarded in one step is used once."""
        slots, keys, sums = self._sums(due)
        shown = sums[:, 1] > 0
        # A reward alone does not make an edge: of one that was forgotten since, its impression is forgotten, too.
        known = shown if shown.all() else shown | self._table.lookup(slots, keys)[1]
        self._table.lookup_train(slots[known], keys[known], now_ms)
        there = self._table.lookup(slots, keys)[1]  # what finds no room in a full table is not counted
        self._table.apply_gradients(slots[there], keys[there], -sums[there], now_ms)

    def _sums(self, due: Sequence[_Due]) -> tuple[Int32, Int64, Float32]:
        """The edges of some items of impressions, and what is added to each: slots, keys [E], sums [E, 3]."""
        place_of = dict(zip(self.clusters.ids.tolist(), self.clusters.places.tolist(), strict=True))
        most = max(len(opened.clusters) for opened, _, _ in due)
        places, weights = np.full((len(due), most), -1, np.int32), np.zeros((len(due), most))
        for row, (opened, _, _) in enumerate(due):
            places[row, : len(opened.clusters)] = [place_of.get(cluster, -1) for cluster in opened.clusters.tolist()]
            weights[row, : len(opened.clusters)] = opened.weights
        scales = np.array([1.0 if self._decay is None else self._decay.weight(opened.time_ms) for opened, _, _ in due])
        of = np.repeat(np.arange(len(due)), [len(items) for _, items, _ in due])
        keys = np.concatenate([opened.keys[items] for opened, items, _ in due])
        bits = np.concatenate([opened.edges[items] for opened, items, _ in due])[:, None]
        bits = bits >> np.arange(most, dtype=np.uint64) & np.uint64(1)
        item, cluster = np.nonzero(bits.astype(np.bool_) & (places[of] >= 0))
        of = of[item]
        weight, scale = weights[of, cluster], scales[of]
        shown = np.array([what == SHOWN for _, _, what in due])[of]
        sums = np.zeros((len(item), 3), np.float32)
        sums[:, 0], sums[:, 1] = np.where(shown, (weight * weight * scale, weight * scale), 0)
        sums[:, 2] = np.where(shown, 0, weight * scale)
        return places[of, cluster], keys[item], sums

    def _follow(self, change: Split | Drop) -> None:
        self.moved = True
        rows = self._rows(change.parent if isinstance(change, Split) else change.place)
        if isinstance(change, Drop):
            self._table.remove(rows.slots, rows.keys)
            return
        rows = replace(rows, values=rows.values * np.float32(0.5))
        restore_within(self._table, rows)
        restore_within(self._table, replace(rows, slots=np.full_like(rows.slots, change.child)))

    def _rows(self, place: int | None = None) -> Rows:
        """All edges, or those of one place."""
        touched = self._table.touched(CURSOR)
        self._table.release(CURSOR)
        chosen = np.ones(len(touched.keys), np.bool_) if place is None else touched.slots == place
        return self._table.export(touched.slots[chosen], touched.keys[chosen])

    def _rescale(self, factor: float) -> None:
        self.moved = True
        rows = self._rows()
        self._table.restore(replace(rows, values=rows.values * np.float32(factor)))

    def published(self) -> Arrays:
        """What serving needs beside the edges: clusters' ids, places and centroids, of which generation; the decay's origin."""
        return {
            "ids": self.clusters.ids.copy(),
            "places": self.clusters.places.copy(),
            "centroids": self.clusters.centroids(),
            "weights": self.clusters.weights(),
            "generation": np.frombuffer(self.clusters.generation.encode(), np.uint8).copy(),
            **self._clock(),
        }

    def _clock(self) -> Arrays:
        """What gives the edges' sums their meaning: the decay's state, the latest step's log time, and its half-life (0: none)."""
        state = (-(2**63), 0, self._now_ms) if self._decay is None else self._decay.state()
        half_life_s = 0.0 if self._decay is None else self._decay.half_life_ms / 1000
        return {"decay": np.array(state, np.int64), "half_life_s": np.array([half_life_s])}

    def state(self) -> Arrays:
        """Everything but the edges, as arrays."""
        opened = [one for _, one in self._open.items()]
        return {
            **{f"clusters.{name}": array for name, array in self.clusters.state().items()},
            **{f"requests.{name}": array for name, array in self._seen.state(Kind.EXPLORED).items()},
            **self._clock(),
            "open.ids": joined(self._open),
            "open.times": np.array([o.time_ms for o in opened], np.int64),
            "open.sizes": np.array([(len(o.clusters), len(o.keys)) for o in opened], np.int64).reshape(-1, 2),
            "open.clusters": _flat([o.clusters for o in opened], np.int64),
            "open.weights": _flat([o.weights for o in opened], np.float32),
            "open.keys": _flat([o.keys for o in opened], np.int64),
            "open.edges": _flat([o.edges.view(np.int64) for o in opened], np.int64),
            "open.became": _flat([o.became for o in opened], np.uint8),
        }

    def restore(self, state: Arrays) -> None:
        """Load what `state` returned. Early feedback that older releases kept here, too, the joiner has."""
        self.clusters.restore(_part(state, "clusters."))
        self._seen.restore(Kind.EXPLORED, _part(state, "requests."))
        self._restore_sums(state["decay"].tolist(), state.get("half_life_s"))
        opened = _part(state, "open.")
        clusters_end, items_end = opened["sizes"].cumsum(0).T
        of_clusters = [np.split(opened[name], clusters_end[:-1]) for name in ("clusters", "weights")]
        of_items = [np.split(opened[name], items_end[:-1]) for name in ("keys", "edges", "became")]
        rows = zip(split(opened["ids"]), opened["times"].tolist(), *of_clusters, *of_items, strict=False)
        self._open.clear()
        for r, t, c, w, k, e, b in rows:
            num_bytes = _bytes_of(r, len(c), len(k))
            self._open.add(r, _Open(t, c, w, k, e.view(np.uint64), b.copy(), num_bytes))

    def _restore_sums(self, clock: list[int], half_life_s: npt.NDArray[np.float64] | None) -> None:
        """Take over the edges, which the table holds already, in the units that they were saved in: another half-life keeps what they are
        as of the last step."""
        own = self._decay.half_life_ms / 1000 if self._decay is not None else 0.0
        saved = own if half_life_s is None else float(half_life_s[0])
        self._now_ms = clock[2] if len(clock) > 2 else 0
        factor = 1.0
        if saved and self._decay is not None:
            factor = self._decay.restore(clock, saved)
        elif self._decay is not None and self._now_ms:
            self._decay.rescale(self._now_ms)
        elif saved:
            decay = ForwardDecay(saved, MAX_EXPONENT)
            decay.restore(clock)
            factor = decay.decay(self._now_ms)
        rows = self._rows()
        usable = (np.isfinite(rows.values) & (rows.values >= 0)).all(1)
        if not usable.all():
            logger.error("%d edges of the bandit held no counts and begin anew", np.count_nonzero(~usable))
            self._table.remove(rows.slots[~usable], rows.keys[~usable])
        if factor != 1.0:
            self._rescale(factor)


def _bytes_of(request_id: str, clusters: int, items: int) -> int:
    """In memory, about."""
    return 1000 + len(request_id) + 12 * clusters + 17 * items


def _flat(parts: Sequence[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts])


def _part(state: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
