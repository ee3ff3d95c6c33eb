"""What is scored of a request's items: the wide part values all of them, the whole network those that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.model.plan import Plan
from recsys.model.scoring import Scores
from recsys.ranking.value import Value
from recsys.types import Float32, Int64

NONE = np.zeros(0, np.int64)
Rows = Sequence[Float32]
"""What was looked up for a plan: deep [U, d + tasks …] and wide [U', tasks]."""


class TwoStages:
    """Which items are kept, and their probabilities. Thread-safe: nothing here changes."""

    def __init__(self, config: Config) -> None:
        self.value = Value(config)

    def score(
        self, scores: Scores, lay: Plan, rows: Rows, most: int, always: Int64 = NONE
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        """Which items of a request laid out are kept [k], `always` among them, and their probabilities [k, T]."""
        kept = np.arange(len(lay.item))
        deep, wide = rows
        light = scores.light(lay, deep, wide)
        if len(kept) > most:
            kept = self._kept(scores.probabilities(light), most, always)
            lay, light = lay.keep(kept), light[kept]
        return kept, scores.predict(lay, deep, light)

    def _kept(self, light: Float32, most: int, always: Int64) -> npt.NDArray[np.intp]:
        """The items that the wide part values most, and `always`."""
        value = self.value(light)
        value[always] = np.inf
        return np.sort(np.argsort(-value, kind="stable")[:most])
