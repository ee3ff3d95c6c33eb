"""What each stage of a request found: the next one starts from it, and nothing is written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.base import Asked, Deadline
from recsys.candidates.find import Candidates
from recsys.features.build import Features
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scored
from recsys.types import UserState

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A request, and what is known of its user."""

    request: Request
    now_ms: int
    deadline: Deadline
    state: UserState
    history_rows: Sequence[int]
    """Rows of what the user chose in this session (of their history where it is new), newest first."""
    degraded: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Its candidates, and what the sources were asked."""

    opened: Opened
    asked: Asked
    candidates: Candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Those that the whole network scored, or all of them where there was no model to be had."""

    gathered: Gathered
    kept: Candidates
    features: Features | None
    """Of the kept; None: the ranker is off."""
    scored: Scored | None
    """The ranker's answer; None: there was none, and the sources' scores rank."""
    scores: Float64
    """The value that ranks [K]."""

    @property
    def degraded(self) -> tuple[str, ...]:
        """What was missing, in the order of the stages."""
        missed = (f"deadline_{stage}" for stage in self.gathered.opened.deadline.missed)
        away = ("no_parameters",) if self.scored is not None and not self.scored.available else ()
        return (*self.gathered.opened.degraded, *missed, *away)
