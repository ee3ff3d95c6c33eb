"""How much of what was counted a request may know: all of it, unless an experiment says otherwise from outside."""

from __future__ import annotations

from typing import Protocol

from recsys.features.feature_kernels import Columns
from recsys.types import Float32


class Visibility(Protocol):
    """Asked for each request's counters."""

    def as_of_ms(self, now_ms: int) -> int:
        """The log time as of which counts are read."""
        ...

    def see_own(self, columns: Columns, counts: Float32, now_ms: int) -> None:
        """Put what is known of the user's own counts into `counts` [K, C, H, W], where that is newer."""
        ...


class Everything:
    """What was counted is known."""

    def as_of_ms(self, now_ms: int) -> int:
        return now_ms

    def see_own(self, columns: Columns, counts: Float32, now_ms: int) -> None:
        """It is in `counts`."""


EVERYTHING = Everything()
