"""The candidate sources that there are. A new one is a module with its class, and a line here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from recsys.errors import nearest


class Listed(NamedTuple):
    """One source."""

    made_by: str
    """`module:Class`, a `recsys.candidates.base.Source` of the same name."""
    quota: int | None = None
    """Most candidates unless configured, 0: none; None: it has no quota, the request or the rules ask for it."""
    note: str = ""
    """What it needs, for the documents."""


SOURCES: dict[str, Listed] = {
    "bandit": Listed("recsys.candidates.bandit:BanditSource", 50),
    "caller": Listed("recsys.candidates.caller:CallerSource"),
    "covisited": Listed("recsys.candidates.covisited:CovisitedSource", 100),
    "followed": Listed("recsys.candidates.followed:FollowedSource", 100),
    "following": Listed("recsys.candidates.following:FollowingSource", 0, "with `features.transitions`"),
    "nearest": Listed("recsys.candidates.nearest:NearestSource", 100),
    "newest": Listed("recsys.candidates.newest:NewestSource"),
    "pinned": Listed("recsys.candidates.pinned:PinnedSource"),
    "trending": Listed("recsys.candidates.trending:TrendingSource", 150),
}
"""Source name → where it is. The names are public: configurations, boosts, answers, impressions and snapshots hold them."""


def default_quotas() -> dict[str, int]:
    """Most candidates of each source that brings any unless configured otherwise."""
    return {name: listed.quota for name, listed in SOURCES.items() if listed.quota}


def with_quota() -> dict[str, str]:
    """The names that `retrieval.sources` may hold, with what each of them needs."""
    return {name: listed.note for name, listed in SOURCES.items() if listed.quota is not None}


def without_quota() -> list[str]:
    """The sources that the request or the rules ask for."""
    return [name for name, listed in SOURCES.items() if listed.quota is None]


def described() -> str:
    """The names that `retrieval.sources` may hold, in a line."""
    return ", ".join(f"{name} ({note})" if note else name for name, note in with_quota().items())


def check(names: Iterable[str]) -> None:
    """ValueError where `retrieval.sources` names what is no source, or one that has no quota."""
    for name in names:
        if name not in with_quota():
            near = nearest(name, with_quota())
            raise ValueError(f"retrieval.sources: unknown source {name!r}, did you mean {near!r}? Known: {described()}")
