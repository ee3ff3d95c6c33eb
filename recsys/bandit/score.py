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
from recsys.types import Bool, Float32, Int32, Int64

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
def _parts(d: Any, n: Any, b: Any, rule: Any, scale: Any) -> Any:
    """An edge's reward rate and 1/d; (0, 0) of one without impressions."""
    d = scale * d + rule.prior
    if not d > 0.0:
        return 0.0, 0.0
    return scale * b / (d if rule.published else scale * n + rule.prior), 1.0 / d


@compiled
def _finish(totals: Any, rule: Any, out: Any) -> None:
    """From each item's totals [M, 4]: Σ w, Σ w of seen edges, Σ w rate, Σ w²/d."""
    for at in range(len(totals)):
        seen, mean = totals[at, 1], totals[at, 2]
        out.mean[at] = mean if rule.published or seen == 0.0 else mean / seen
        out.width[at] = np.sqrt(totals[at, 3])
        out.fresh[at] = totals[at, 0] - seen > rule.fresh_above * totals[at, 0]


@compiled
def _score(weights: Any, edges: Any, rule: Any, places: Any, out: Any) -> int:
    """Fill `out` item by item in the order of first appearance; how many. `places` is a power of two of zeros, more than E."""
    last = np.uint64(len(places) - 1)
    count = 0
    totals = np.zeros((len(edges.d), 4), np.float64)
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
        rate, inverse = _parts(edges.d[edge], edges.n[edge], edges.b[edge], rule, edges.scale)
        totals[at, 0] += weight
        totals[at, 1] += weight if inverse > 0.0 else 0.0
        totals[at, 2] += weight * rate
        totals[at, 3] += weight * weight * inverse
    _finish(totals[:count], rule, out)
    return count


def score(weights: Float32, edges: Edges, rule: Rule = NORMALISED) -> Scores:
    """Score the items of these edges under the weights [K] of their clusters. An edge of weight 0 is not active."""
    size = len(edges.item)
    places, out = np.zeros(1 << (2 * size).bit_length(), np.int32), _room(size)
    count = _score(weights, edges._replace(scale=float(edges.scale)), rule, places, out)
    return Scores(out.items[:count], out.mean[:count], out.width[:count], out.fresh[:count])


@compiled
def _score_grouped(weights: Any, grouped: Any, sums: Any, scale: Any, rule: Any, out: Any) -> None:
    totals = np.zeros((len(out.mean), 4), np.float64)
    for edge in range(len(grouped.candidate)):
        weight, at, place = np.float64(weights[grouped.column[edge]]), grouped.candidate[edge], grouped.edge[edge]
        rate, inverse = _parts(sums[place, 0], sums[place, 1], sums[place, 2], rule, scale)
        totals[at, 0] += weight
        totals[at, 1] += weight if inverse > 0.0 else 0.0
        totals[at, 2] += weight * rate
        totals[at, 3] += weight * weight * inverse
    _finish(totals, rule, out)


class Grouped(NamedTuple):
    """Edges whose candidates are numbered already: candidate, column (which of the weights) and edge (which row of sums), [E] each."""

    candidate: Int32
    column: Int32
    edge: Int32


def score_grouped(weights: Float32, grouped: Grouped, sums: Any, scale: float, rule: Rule, num: int) -> Scores:
    """`score` of candidates 0 to num - 1, in that order; sums [all edges, 3] are d, n, b in float64. One without an edge has 0."""
    out = _room(num)
    _score_grouped(weights, grouped, sums, scale, rule, out)
    out.items[:] = np.arange(num)
    return out


def _room(size: int) -> Scores:
    items, fresh = np.empty(size, np.int64), np.empty(size, np.bool_)
    mean, width = np.empty((2, size), np.float32)
    return Scores(items, mean, width, fresh)


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


def valued(scores: Scores, alpha: float, sampled: np.random.Generator | None = None) -> Float32:
    """What items are ranked by [M]: UCB, or (Thompson sampling) a normal draw around the mean, alpha widths its deviation."""
    amount = np.float32(alpha)
    widths = amount if sampled is None else amount * sampled.standard_normal(len(scores.mean), np.float32)
    values: Float32 = scores.mean + widths * scores.width
    return values


def choose(scores: Scores, k: int, alpha: float, rng: np.random.Generator, *, sampled: bool = False) -> Int64:
    """The rows of the min(k, M) best by UCB or sampled, best first, the fresh tier before all in random order."""
    return best(valued(scores, alpha, rng if sampled else None), k, rng, scores.fresh)


def warm_up() -> None:
    """Compile, or load from the cache, before the first request."""
    nothing = np.zeros(0, np.float32)
    for kind in (np.int32, np.int64):
        score(nothing, Edges(np.zeros(0, kind), np.zeros(0, kind), nothing, nothing, nothing))
