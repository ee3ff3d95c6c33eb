"""Impressions whose items may still be rewarded, and what those that were shown or rewarded add to the bandit's edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.served import UInt64
from recsys.events.open_requests import OpenRequests
from recsys.keys import joined, split
from recsys.types import Float32, Int32, Int64, UInt8

Arrays = dict[str, npt.NDArray[Any]]
SHOWN, REWARDED = 1, 2
"""Bits of what became of an item of an open impression."""


@dataclass(slots=True)
class Open:
    """An impression that may still be rewarded: its active clusters [K], their weights, its items' keys [N] and edges [N]."""

    time_ms: int
    clusters: Int64
    weights: Float32
    keys: Int64
    edges: UInt64
    became: UInt8
    num_bytes: int
    """What it takes of the bound."""

    def becomes(self, at: Int64, what: int) -> list[Due]:
        """An item was shown, or rewarded; what is due by that. A reward of one that does not count as shown yet waits until it does."""
        before = int(self.became[at[0]])
        self.became[at[0]] |= what
        ready = before | what
        return [
            (self, at, bit)
            for bit in (SHOWN, REWARDED)
            if ready & SHOWN and ready & bit and not (before & SHOWN and before & bit)
        ]


Due = tuple[Open, Int64, int]
"""Items (by number) of an impression that count as shown, or as rewarded."""


def opened_state(opened: OpenRequests[Open]) -> Arrays:
    """All of them, as arrays."""
    every = [one for _, one in opened.items()]
    return {
        "ids": joined(opened),
        "times": np.array([o.time_ms for o in every], np.int64),
        "sizes": np.array([(len(o.clusters), len(o.keys)) for o in every], np.int64).reshape(-1, 2),
        "clusters": _flat([o.clusters for o in every], np.int64),
        "weights": _flat([o.weights for o in every], np.float32),
        "keys": _flat([o.keys for o in every], np.int64),
        "edges": _flat([o.edges.view(np.int64) for o in every], np.int64),
        "became": _flat([o.became for o in every], np.uint8),
    }


def restore_opened(opened: OpenRequests[Open], state: Arrays) -> None:
    """Load what `opened_state` returned."""
    clusters_end, items_end = state["sizes"].cumsum(0).T
    of_clusters = [np.split(state[name], clusters_end[:-1]) for name in ("clusters", "weights")]
    of_items = [np.split(state[name], items_end[:-1]) for name in ("keys", "edges", "became")]
    rows = zip(split(state["ids"]), state["times"].tolist(), *of_clusters, *of_items, strict=False)
    opened.clear()
    for request_id, time_ms, clusters, weights, keys, edges, became in rows:
        num_bytes = bytes_of(request_id, len(clusters), len(keys))
        opened.add(request_id, Open(time_ms, clusters, weights, keys, edges.view(np.uint64), became.copy(), num_bytes))


def sums_of(
    due: Sequence[Due], place_of: Mapping[int, int], worth: Callable[[int], float]
) -> tuple[Int32, Int64, Float32]:
    """The edges of some items of impressions, and what is added to each: slots, keys [E], sums [E, 3]. `place_of`: each cluster's;
    `worth`: what is added now of an impression of that log time."""
    most = max(len(opened.clusters) for opened, _, _ in due)
    places, weights = np.full((len(due), most), -1, np.int32), np.zeros((len(due), most))
    for row, (opened, _, _) in enumerate(due):
        places[row, : len(opened.clusters)] = [place_of.get(cluster, -1) for cluster in opened.clusters.tolist()]
        weights[row, : len(opened.clusters)] = opened.weights
    scales = np.array([worth(opened.time_ms) for opened, _, _ in due])
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


def bytes_of(request_id: str, clusters: int, items: int) -> int:
    """What an open impression takes in memory, about."""
    return 1000 + len(request_id) + 12 * clusters + 17 * items


def _flat(parts: Sequence[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts])
