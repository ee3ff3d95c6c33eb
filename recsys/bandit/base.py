"""The contract of policies: what they see of requests, what they answer, what they learn from.

Legend: B requests, K active clusters, M candidates of all requests together, E edges between them, S size of a pool,
N events, H width of the last hidden layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recsys.errors import BadInput
from recsys.types import Float32, Int32, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """B requests and their candidates, flat: those of request r are `starts[r]` to `starts[r + 1]`, each item once."""

    now_ms: int
    clusters: Int64
    """The active clusters [B, K]."""
    weights: Float32
    """Of the active clusters [B, K], 0 where there are fewer than K."""
    starts: Int64
    """[B + 1]"""
    items: Int64
    """Rows of the catalogue [M]."""
    candidate: Int32
    """Of each edge [E]: which of the M candidates."""
    column: Int32
    """Of each edge [E]: request · K + which of its K clusters."""
    edge: Int32
    """Of each edge [E]: its place in the sums."""
    scores: Float32 | None = None
    """The ranker's predicted rewards [M]; only `square_cb` needs them."""
    hidden: Float32 | None = None
    """The ranker's last hidden layer [M, H]; only `neural` needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """For each request a pool, best first, and one drawn from it."""

    pool: Int64
    """Candidates by their place among M [B, S]; -1 beyond the end of a smaller pool."""
    probabilities: Float32
    """[B, S]: sum to 1 in each pool that is not empty, 0 beyond its end. Given the pool: how it came about is not in them."""
    drawn: Int64
    """The chosen candidate by its place among M [B]; -1 for a request without candidates."""
    propensity: Float32
    """The probability that `drawn` had [B]; 0 where nothing was drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """What happened to chosen items. The impression and its reward may come together, or the reward later, on its own.

    An event adds its parts: impressions = 1, rewards = 0 says that the item was shown; impressions = 0, rewards = r that r was earned since.
    """

    clusters: Int64
    """As served [N, K]."""
    weights: Float32
    """As served [N, K]: recomputing them with a newer user vector would break the sums."""
    items: Int64
    """[N]"""
    edges: Int64
    """Places in the sums of the item's edges with each of the clusters [N, K]; -1 where there is none."""
    impressions: Float32
    """[N], 1 or 0."""
    rewards: Float32
    """[N], scaled to 0-1, so that one α fits all."""
    times_ms: Int64
    """When the item was shown [N]: a late reward decays as its impression does, or means would grow with the delay."""
    hidden: Float32 | None = None
    """As served [N, H]."""


class Policy(Protocol):
    """Chooses for batches of requests and learns from batches of events. Not thread-safe."""

    def choose(self, requests: Requests) -> Choices:
        """Choose one candidate of each request; BadInput when the policy needs what the requests lack."""

    def update(self, events: Events) -> None:
        """Learn. Events of one call are as good as simultaneous."""


class Values(Protocol):
    """What a policy ranks by."""

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, Any]:
        """A number for each candidate [M], larger is better, and a mask of those to rank before all others (None: none)."""

    def learn(self, events: Events) -> None:
        """Take events in."""


def needed(array: Float32 | None, name: str, policy: str) -> Float32:
    """The array; BadInput where there is none, or where it is not finite."""
    if array is None:
        raise BadInput(
            f"policy {policy!r} needs {name}, and the requests have none: pass them, or choose another policy"
        )
    if not np.isfinite(array).all():
        raise BadInput(f"{name} for policy {policy!r} are not finite: look at what computed them")
    return array
