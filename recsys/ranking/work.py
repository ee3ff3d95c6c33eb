"""One request under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from recsys.candidates.bandit import Active
from recsys.candidates.generation import Located
from recsys.features.build import Features, UserFeatures
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scored
from recsys.types import Bool, Float32, Int32, Int64, UserState


@dataclass(slots=True)
class Work:
    """One request under way: what each stage found."""

    request: Request
    now_ms: int
    deadline: float
    degraded: list[str] = field(default_factory=list)
    state: UserState = UserState()
    history_rows: list[int] = field(default_factory=list)
    pinned: dict[int, int] = field(default_factory=dict)
    """Position → catalogue row of items with a place of their own."""
    allowed: Bool | None = None
    """Which catalogue rows pass the request's filters; None: all do. Rows beyond its end are newer: not allowed."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Most candidates of each source."""
    forbidden: set[int] = field(default_factory=set)
    """Rows that rules leave out of this answer, whatever they are."""
    candidates: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    """Catalogue rows of all candidates, the best as mixed first."""
    rows: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    """Those that are still in it."""
    names: tuple[str, ...] = ()
    masks: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    source_scores: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    user: UserFeatures | None = None
    located: Located | None = None
    active: Active | None = None
    features: Features | None = None
    scored: Scored | None = None
    """The ranker's answer; None: there was none, and the sources' scores rank."""
    scores: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def sources(self, candidate: int) -> tuple[str, ...]:
        """The sources that brought a candidate."""
        mask = int(self.masks[candidate])
        return tuple(name for bit, name in enumerate(self.names) if mask >> bit & 1)

    def keep(self, candidates: npt.NDArray[np.intp]) -> None:
        """Go on with these candidates only."""
        self.rows, self.masks = self.rows[candidates], self.masks[candidates]
        self.source_scores = self.source_scores[candidates]
        if self.features is not None:
            self.features = self.features.take(candidates)

    def late(self, stage: str) -> bool:
        """Whether the deadline has passed; then the stage is skipped and the answer says so."""
        if time.perf_counter() < self.deadline:
            return False
        self.degraded.append(f"deadline_{stage}")
        return True
