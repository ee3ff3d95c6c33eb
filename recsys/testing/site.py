"""A generated site over weeks, whose right answers are known: users and items that come and go, a daily rhythm, true click rates.

Legend: U users, I items, K items of one list. Numbers of users and items are their indices in the site's arrays. Hours are drawn one
by one, each a function of (seed, hour) alone, so that two systems that answer differently still meet the same site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.types import Bool, Int64, Item

Float64 = npt.NDArray[np.float64]
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
SHELF = 20
"""Items of a list that the site made itself and only wants ranked."""
FAVOURITES = 3
"""Kinds that a user likes."""
LIKED = 2.0
"""What liking its kind adds to the logit of a click."""
QUALITY = 0.7
"""Standard deviation of an item's own part of the logit."""
BIAS = -2.8
"""Logit of a click on an item of no special quality whose kind the user does not care about."""
PLAIN_TYPES = ("click", "like", "purchase", "view")
PLAIN_SHARES = (0.80, 0.12, 0.03, 0.05)
CLICK_S, LIKE_S = (3.0, 45.0), (30.0, 500.0)
"""A click comes so many seconds after the list, a like or purchase so many after it: inside of the default label windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How large a site is. A day's visits and events follow a daily rhythm."""

    active: int = 20_000
    """Users of any one moment."""
    users: int = 200_000
    """All users there are: who leaves may come back."""
    new_items: int = 5_000
    """Items that come each day; as many go."""
    item_days: float = 4.0
    """How long an item stays, on average."""
    user_days: float = 10 / 3
    """How long a user stays, on average."""
    visits: int = 667
    """Requests a day."""
    events: int = 6_000
    """Feedback a day beside what users do with the lists."""
    kinds: int = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request to come. `shelf`: the site's own list, to be ranked; None: anything may be shown."""

    number: int
    at_ms: int
    user: int
    user_id: str
    shelf: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """What happens in one hour, each in order of time; times in milliseconds since the site's start."""

    arrivals: list[tuple[int, Item]]
    departures: list[tuple[int, str]]
    visits: list[Visit]
    events: list[dict[str, Any]]
    """Feedback as it is sent, without its version."""


class Site:
    """`days` days of a site. The logit of a click is BIAS + LIKED where the kind is one of the user's + the item's own quality."""

    def __init__(self, traffic: Traffic, days: int, seed: int = 0) -> None:
        self.traffic, self.days, self._seed = traffic, days, seed
        rng = np.random.default_rng([seed, 0])
        self._lay_out_items(rng)
        self._lay_out_users(rng)
        self._kind_share = rng.dirichlet(np.full(traffic.kinds, 2.0))

    def _lay_out_items(self, rng: np.random.Generator) -> None:
        """Items come all the time, from so long before the start that at every moment as many are there."""
        traffic = self.traffic
        longest = 1.5 * traffic.item_days
        count = int(traffic.new_items * (self.days + longest))
        self.born_ms: Int64 = np.sort(rng.uniform(-longest, self.days, count) * DAY_MS).astype(np.int64)
        self.gone_ms: Int64 = self.born_ms + (rng.uniform(0.5, 1.5, count) * traffic.item_days * DAY_MS).astype(
            np.int64
        )
        self.kind: Int64 = rng.integers(traffic.kinds, size=count)
        self.quality: Float64 = rng.normal(0.0, QUALITY, count)
        self._hint = np.rint(2 * (self.quality + rng.normal(0.0, QUALITY, count))).astype(np.int64)

    def _lay_out_users(self, rng: np.random.Generator) -> None:
        traffic = self.traffic
        before = 4 * traffic.user_days
        stays = int(traffic.active / traffic.user_days * (self.days + before))
        self._comes_ms = np.sort(rng.uniform(-before, self.days, stays) * DAY_MS).astype(np.int64)
        self._leaves_ms = self._comes_ms + (rng.exponential(traffic.user_days, stays) * DAY_MS).astype(np.int64)
        self._who = np.arange(stays) % traffic.users
        self._activity = rng.lognormal(0.0, 1.2, stays)
        self._favourites: Int64 = rng.integers(traffic.kinds, size=(traffic.users, FAVOURITES))

    def first_items(self) -> list[Item]:
        """The catalogue at the start."""
        return [self._item(n) for n in np.flatnonzero((self.born_ms <= 0) & (self.gone_ms > 0)).tolist()]

    def _item(self, number: int) -> Item:
        """Attribute `category` is the kind; `tags` say a little about the quality, and name one of many series."""
        kind = f"kind-{self.kind[number]}"
        tags = [f"grade-{self._hint[number]}", f"series-{number * 7919 % 997}"]
        return Item(item_id=item_id(number), title=f"No. {number}", attributes={"category": kind, "tags": tags})

    def hour(self, number: int) -> Hour:
        """Hour `number` since the start."""
        rng = np.random.default_rng([self._seed, 1, number])
        start, end = number * HOUR_MS, (number + 1) * HOUR_MS
        alive, bounds, mass = self._alive(start)
        stays = np.flatnonzero((self._comes_ms <= start) & (self._leaves_ms > start))
        crowd = np.cumsum(self._activity[stays])

        def users(count: int) -> Int64:
            return self._who[stays[np.searchsorted(crowd, rng.random(count) * crowd[-1], side="right")]]

        def items(kinds: Int64) -> Int64:
            low, high = bounds[kinds], bounds[kinds + 1]
            drawn = np.searchsorted(mass, low + rng.random(len(kinds)) * (high - low), side="right")
            return alive[np.minimum(drawn, len(alive) - 1)]

        share = _rhythm(number % 24)
        visitors = users(rng.poisson(self.traffic.visits * share))
        on_shelf = rng.random(len(visitors)) < 0.5
        times = np.sort(rng.integers(start, end, len(visitors)))
        shelves = [
            items(self._kinds(np.full(2 * SHELF, user), 0.4, rng)) if own else None
            for user, own in zip(visitors, on_shelf, strict=True)
        ]
        visits = [
            Visit(
                number=number * 1_000_000 + place,
                at_ms=int(at),
                user=int(user),
                user_id=user_id(user),
                shelf=None if shelf is None else tuple(map(item_id, dict.fromkeys(shelf.tolist())))[:SHELF],
            )
            for place, (at, user, shelf) in enumerate(zip(times, visitors, shelves, strict=True))
        ]
        actors = users(rng.poisson(self.traffic.events * share))
        return Hour(
            arrivals=[(int(self.born_ms[n]), self._item(n)) for n in _within(self.born_ms, start, end)],
            departures=[(int(self.gone_ms[n]), item_id(n)) for n in _within(self.gone_ms, start, end)],
            visits=visits,
            events=self._plain(number, actors, items(self._kinds(actors, 0.75, rng)), rng),
        )

    def _alive(self, now_ms: int) -> tuple[Int64, Float64, Float64]:
        """Items there are, by kind; how much popularity lies before each kind; and their popularity, summed up."""
        alive = np.flatnonzero((self.born_ms <= now_ms) & (self.gone_ms > now_ms + HOUR_MS))
        alive = alive[np.argsort(self.kind[alive], kind="stable")]
        mass = np.cumsum(np.exp(self.quality[alive]))
        ends = np.searchsorted(self.kind[alive], np.arange(self.traffic.kinds + 1))
        return alive, np.concatenate([[0.0], mass])[ends], mass

    def _kinds(self, users: Int64, liked: float, rng: np.random.Generator) -> Int64:
        """A kind for each user: one of theirs with probability `liked`, else any."""
        own = self._favourites[users, rng.integers(FAVOURITES, size=len(users))]
        every = rng.choice(self.traffic.kinds, len(users), p=self._kind_share)
        return np.where(rng.random(len(users)) < liked, own, every)

    def _plain(self, hour: int, users: Int64, items: Int64, rng: np.random.Generator) -> list[dict[str, Any]]:
        times = np.sort(rng.integers(hour * HOUR_MS, (hour + 1) * HOUR_MS, len(users)))
        types = rng.choice(len(PLAIN_TYPES), len(users), p=PLAIN_SHARES)
        return [
            {
                "event_id": f"plain-{hour}-{place}",
                "user_id": user_id(user),
                "item_id": item_id(item),
                "type": PLAIN_TYPES[kind],
                "time_ms": at,
            }
            for place, (user, item, kind, at) in enumerate(
                zip(users.tolist(), items.tolist(), types.tolist(), times.tolist(), strict=True)
            )
        ]

    def probability(self, user: int, item_ids: Sequence[str]) -> Float64:
        """True click probabilities [K] of a user's items: the best possible score."""
        items = np.array([number_of(i) for i in item_ids], np.int64)
        liked = (self.kind[items][:, None] == self._favourites[user]).any(1)
        return _sigmoid(BIAS + LIKED * liked + self.quality[items])

    def reactions(self, visit: Visit, request_id: str, item_ids: Sequence[str]) -> tuple[Bool, list[dict[str, Any]]]:
        """Which of the list's items the user clicks [K], and all they do with it, as it is sent, in order of time.

        What a user does with an item depends on the visit and the item, not on what else was shown: two systems that show the
        same get the same.
        """
        items = np.array([number_of(i) for i in item_ids], np.int64)
        draw = [_uniform(self._seed, visit.number, items, n) for n in range(4)]
        clicked: Bool = draw[0] < self.probability(visit.user, item_ids)
        liked = clicked & (draw[1] < _sigmoid(self.quality[items] - 1.5))
        kinds = np.where(draw[2] < 0.2, "purchase", "like")
        clicks = visit.at_ms + _between(CLICK_S, draw[3])
        likes = visit.at_ms + _between(LIKE_S, draw[2])
        done = [(int(clicks[k]), "click", item_ids[k]) for k in np.flatnonzero(clicked).tolist()]
        done += [(int(likes[k]), str(kinds[k]), item_ids[k]) for k in np.flatnonzero(liked).tolist()]
        return clicked, [
            {
                "event_id": f"{request_id}-{item}-{kind}",
                "user_id": visit.user_id,
                "item_id": item,
                "type": kind,
                "time_ms": at,
                "request_id": request_id,
            }
            for at, kind, item in sorted(done)
        ]


def item_id(number: int) -> str:
    return f"item-{number}"


def user_id(number: int) -> str:
    return f"user-{number}"


def number_of(public_id: str) -> int:
    return int(public_id.rsplit("-", 1)[1])


def _rhythm(hour: int) -> float:
    """The hour's share of a day: most in the evening, least before dawn."""
    return (1 + 0.7 * math.sin((hour - 11) / 24 * 2 * math.pi)) / 24


def _within(times_ms: Int64, start: int, end: int) -> list[int]:
    """Which lie in [start, end), in order of time."""
    found = np.flatnonzero((times_ms > 0) & (times_ms >= start) & (times_ms < end))
    order: list[int] = found[np.argsort(times_ms[found], kind="stable")].tolist()
    return order


def _sigmoid(logit: Float64) -> Float64:
    probability: Float64 = 1.0 / (1.0 + np.exp(-logit))
    return probability


def _between(bounds_s: tuple[float, float], share: Float64) -> Int64:
    low, high = bounds_s
    return ((low + share * (high - low)) * 1000).astype(np.int64)


def _uniform(seed: int, visit: int, items: Int64, draw: int) -> Float64:
    """Numbers in [0, 1), a hash (splitmix64) of all that is given."""
    start = (seed * 0x9E3779B97F4A7C15 + visit * 0xD1B54A32D192ED03 + draw * 0x8CB92BA72F3D8DD7) % 2**64
    mixed = items.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(start)
    for shift, times in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(times)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
