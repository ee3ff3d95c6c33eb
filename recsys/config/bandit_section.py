"""Options of the bandit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recsys.config.tasks import Section


class BanditConfig(Section):
    """The source `bandit`: what clusters of users made of an item, and how little is known of it. Needs `training.two_tower`."""

    clusters: int = Field(256, ge=1, le=256)
    """Most clusters that users are told apart by; there is one at first, the largest is split."""
    active: int = Field(10, ge=1, le=64)
    """Clusters nearest to a user that a request looks at."""
    temperature: float = Field(0.1, gt=0)
    """Softmax temperature of their weights, in units of the cosine."""
    neighbours: int = Field(100, ge=1, le=10_000)
    """Items nearest to a cluster that have an edge to it, beside a quarter as many of the newest."""
    policy: Literal["diag_linucb", "epsilon_greedy", "thompson"] = "diag_linucb"
    """How items are chosen by what their edges say."""
    normalised: bool = True
    """An item's mean is a mean of rewards; else the published sum, which grows with the number of its edges."""
    fresh_above: float = Field(0.5, ge=0, le=1)
    """diag_linucb, thompson: an item is fresh, and comes before all others, while edges never shown carry more than this share of its
    weight; 0: while there is any, 1: none is."""
    prior: float = Field(0.0, ge=0)
    """Impressions without reward that every edge begins with: with any, no item is fresh and α decides what is tried; .3 learned fastest
    from nothing in the simulated stream."""
    alpha: float = Field(0.05, ge=0)
    """diag_linucb, thompson: what a unit of width adds to the mean, or to a draw's deviation; 0: exploit. In the simulated stream .3
    lost 1.4 times as many clicks and tried no more new items; .02 and .1 hardly differ."""
    epsilon: float = Field(0.1, ge=0, le=1)
    """epsilon_greedy: share of the candidates that are drawn at random."""
    half_life_s: float = Field(14 * 86_400.0, ge=0)
    """What is known of an edge weighs half after this long; 0: for ever the same."""
    expiry_s: float = Field(30 * 86_400.0, gt=0)
    """Edges not shown for this long are forgotten."""
    reward_types: tuple[str, ...] = ("click", "like", "purchase")
    """Feedback types that reward the item they name, once a request."""
    reward_window_s: float = Field(600.0, gt=0, le=3600)
    """Rewards count this long after the impression."""
