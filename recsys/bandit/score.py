"""Diag-LinUCB on the edges of a user's active clusters (Yi et al., RecSys 2023, arXiv 2307.15893): pure functions.

An edge (cluster, item) keeps three sums: over impressions d = Σ w² and n = Σ w, over rewards b = Σ w r, where w is the weight
that the cluster had in the request. Over an item's active edges

    published mean   Σ w b/d           inflated by the number of active edges, since cross terms are dropped
    normalised mean  Σ w b/n / Σ w     a constant reward is its own mean, whatever the weights and edges
    width            √(Σ w²/d)
    UCB              mean + α width

An edge without impressions (d = 0) counts in no sum above, and makes its item fresh: an explicit tier before all others, in
random order, never an infinity within a sum. Where clusters overlap and an item has many edges, "any edge" explores all of
them before anything else; `fresh_above` calls an item fresh only when more than this share of its active weight is unseen.
A `prior`, impressions of weight 1 without reward that every edge begins with and keeps, makes no edge unseen and no item fresh:
its width is finite and its mean leans to 0. LinUCB's A = I + … is a prior of 1.

Legend: D dimensions, C clusters, K active clusters, E edges of the active clusters, M items among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.errors import BadInput
from recsys.types import Bool, Float32, Int64

INACTIVE = 1e-6
"""A weight below this share is 0: its square would vanish beside float32 sums, and an edge with no d stays fresh for ever."""


class Edges(NamedTuple):
    """The edges of one request's active clusters, flat: [E] each, in any order, at most one of each (cluster, item)."""

    cluster: Any
    """Which of the K active clusters, from 0 [E] integers."""
    item: Any
    """[E] integers, any."""
    d: Float32
    n: Float32
    b: Float32
    scale: float = 1.0
    """What stored sums are multiplied by to be as of now (forward decay). Without a prior only the width sees it."""


class Rule(NamedTuple):
    """How sums become scores."""

    published: bool = False
    """The published mean instead of the normalised one."""
    fresh_above: float = 0.0
    """An item whose unseen edges carry more than this share of its active weight is fresh; 0: any unseen edge."""
    prior: float = 0.0
    """Impressions of weight 1, without reward, in every edge."""


NORMALISED = Rule()


class Scores(NamedTuple):
    """Each item once: items [M], mean [M], width [M], fresh [M]. An item whose edges are all fresh has mean and width 0."""

    items: Int64
    mean: Float32
    width: Float32
    fresh: Bool


def cluster_weights(vector: Float32, centroids: Float32, k: int, temperature: float) -> tuple[Int64, Float32]:
    """The min(k, C) active clusters of a vector [D], nearest first, and their weights: softmax of ⟨vector, centroid⟩/temperature.

    Weights sum to 1 and are > 0: a cluster whose weight would be below `INACTIVE` is left out. Equal products: the lower index
    first. BadInput for a vector that is not finite or has no direction.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"need k ≥ 1 and temperature > 0, got {k} and {temperature}")
    if not np.isfinite(vector).all() or not vector.any():
        raise BadInput("the user's vector is 0 or not finite: it has no nearest cluster; leave the bandit out")
    products = centroids @ vector
    nearest = np.argsort(-products, kind="stable")[:k]
    logits = products[nearest].astype(np.float64) / temperature
    weights = np.exp(logits - logits[:1])
    weights /= weights.sum()
    active = weights >= INACTIVE
    weights = weights[active]
    return nearest[active], (weights / weights.sum()).astype(np.float32)


@compiled
def _score(weights: Any, edges: Any, rule: Any, places: Any, out: Any) -> int:
    """Fill `out` item by item in the order of first appearance; how many. `places` is a power of two of zeros, more than E."""
    last = np.uint64(len(places) - 1)
    count = 0
    shares = np.zeros(len(edges.d), np.float64)
    unseen = np.zeros(len(edges.d), np.float64)
    means = np.zeros(len(edges.d), np.float64)
    variances = np.zeros(len(edges.d), np.float64)
    for edge in range(len(edges.d)):
        weight = np.float64(weights[edges.cluster[edge]])
        if weight == 0.0:
            continue
        item = np.int64(edges.item[edge])
        place = (np.uint64(item) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) & last
        while places[place] and out.items[places[place] - 1] != item:
            place = (place + np.uint64(1)) & last
        if places[place] == 0:
            out.items[count] = item
            count += 1
            places[place] = count
        at = places[place] - 1
        d = edges.scale * edges.d[edge] + rule.prior
        if not d > 0.0:
            unseen[at] += weight
            continue
        shares[at] += weight
        n = d if rule.published else edges.scale * edges.n[edge] + rule.prior
        means[at] += weight * edges.scale * edges.b[edge] / n
        variances[at] += weight * weight / d
    for at in range(count):
        mean = means[at] if rule.published or shares[at] == 0.0 else means[at] / shares[at]
        out.mean[at] = mean
        out.width[at] = np.sqrt(variances[at])
        out.fresh[at] = unseen[at] > rule.fresh_above * (shares[at] + unseen[at])
    return count


def score(weights: Float32, edges: Edges, rule: Rule = NORMALISED) -> Scores:
    """Score the items of these edges under the weights [K] of their clusters. An edge of weight 0 is not active."""
    size = len(edges.item)
    places = np.zeros(1 << (2 * size).bit_length(), np.int32)
    items, fresh = np.empty(size, np.int64), np.empty(size, np.bool_)
    mean, width = np.empty((2, size), np.float32)
    out = Scores(items, mean, width, fresh)
    count = _score(weights, edges._replace(scale=float(edges.scale)), rule, places, out)
    return Scores(items[:count], mean[:count], width[:count], fresh[:count])


def best(values: Float32, k: int, rng: np.random.Generator, first: Bool | None = None) -> Int64:
    """The rows of the min(k, M) largest values [M], best first; those of `first` before all others, in random order; ties at random."""
    ties = rng.random(len(values))
    if first is None or not first.any():
        return _largest(values, k, ties)
    chosen = np.flatnonzero(first)
    chosen = chosen[np.argsort(ties[chosen])][:k]
    rest = np.flatnonzero(~first)
    return np.concatenate([chosen, rest[_largest(values[rest], k - len(chosen), ties[rest])]])


def _largest(values: Float32, k: int, ties: Any) -> Int64:
    if k <= 0:
        return np.zeros(0, np.int64)
    rows = np.arange(len(values))
    if k < len(values):
        rows = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return rows[np.lexsort((ties[rows], -values[rows]))[:k]]


def choose(scores: Scores, k: int, alpha: float, rng: np.random.Generator) -> Int64:
    """The rows of the min(k, M) best by UCB, best first, the fresh tier before all in random order."""
    return best(scores.mean + np.float32(alpha) * scores.width, k, rng, scores.fresh)


def warm_up() -> None:
    """Compile, or load from the cache, before the first request."""
    nothing = np.zeros(0, np.float32)
    for kind in (np.int32, np.int64):
        score(nothing, Edges(np.zeros(0, kind), np.zeros(0, kind), nothing, nothing, nothing))
