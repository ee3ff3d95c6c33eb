"""A request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recsys.features.filters import Filters


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
