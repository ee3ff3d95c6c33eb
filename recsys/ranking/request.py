"""A request and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recsys.features.filters import Filters
from recsys.types import AsOf, Impression, ShownItem


@dataclass(frozen=True, slots=True, kw_only=True)
class Boost:
    """The score of items that pass the filters and were brought by one of the sources (empty: any) is changed to score · times + plus."""

    filters: Filters = ()
    sources: tuple[str, ...] = ()
    times: float = 1.0
    plus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question. `candidates`: rank only these."""

    request_id: str
    user_id: str
    n: int = 20
    session_id: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    candidates: tuple[str, ...] | None = None
    filters: Filters = ()
    boosts: tuple[Boost, ...] = ()
    pins: Mapping[int, str] = field(default_factory=dict)
    """Position → item."""
    activation: str = "shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is shown, why, and as of when; `impression` is what is logged of it."""

    request_id: str
    items: tuple[ShownItem, ...]
    reasons: tuple[str, ...]
    degraded: tuple[str, ...]
    policy: str
    model_version: str
    generation: str
    parameters: AsOf
    impression: Impression
    titles: tuple[str, ...] = ()
    """Of the items, as they were when they were chosen."""
    note: str = ""
    """Why there are fewer items than asked for; empty when there are not."""
