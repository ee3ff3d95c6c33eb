"""What is scored of a request's items: the wide part values all of them, the whole network those that are kept.

By the kernels; by torch while they are compiled, and of a network that they do not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from recsys.config import Config
from recsys.features.build import Features
from recsys.features.schema import Schema
from recsys.model import scoring
from recsys.model.assemble import ranker_inputs, wide_sums
from recsys.model.plan import Plan
from recsys.model.ranker import Ranker
from recsys.parameters.dense_weights import Networks
from recsys.ranking.value import Value
from recsys.types import Float32, Int64

NONE = np.zeros(0, np.int64)
Rows = Sequence[Float32]
"""What was looked up for a plan: deep [U, d + tasks …] and wide [U', tasks]."""


class TwoStages:
    """Which items are kept, and their probabilities. Thread-safe: nothing here changes."""

    def __init__(self, config: Config, schema: Schema) -> None:
        self._schema, self._dim = schema, config.model.dim
        self.value = Value(config)

    def score(
        self, networks: Networks, lay: Plan, rows: Rows, most: int, always: Int64 = NONE
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        """Which items of a request laid out are kept [k], `always` among them, and their probabilities [k, T]."""
        kernels = networks.scoring if scoring.compiled.is_set() else None
        if kernels is None:
            return self.score_by_torch(networks.ranker, lay, rows, most, always)
        kept = np.arange(len(lay.item))
        deep, wide = rows
        light = kernels.light(lay, deep, wide)
        if len(kept) > most:
            kept = self._kept(kernels.probabilities(light), most, always)
            lay, light = lay.keep(kept), light[kept]
        return kept, kernels.predict(lay, deep, light)

    def _kept(self, light: Float32, most: int, always: Int64) -> npt.NDArray[np.intp]:
        """The items that the wide part values most, and `always`."""
        value = self.value(light)
        value[always] = np.inf
        return np.sort(np.argsort(-value, kind="stable")[:most])

    def score_by_torch(
        self, ranker: Ranker, lay: Plan, found: Rows, most: int, always: Int64 = NONE
    ) -> tuple[npt.NDArray[np.intp], Float32]:
        """As `score`, by torch."""
        kept = np.arange(len(lay.item))
        deep, wide = map(torch.from_numpy, found)
        with torch.inference_mode():
            if len(kept) > most:
                sums = wide_sums(self._schema, lay, deep, wide, self._dim)
                light = ranker.probabilities(ranker.wide_logits(torch.from_numpy(lay.numbers), sums)).numpy()
                kept = self._kept(light, most, always)
                lay = lay.keep(kept)
            inputs = ranker_inputs(self._schema, lay, deep, wide, self._dim)
            probabilities: Float32 = ranker.eval().predict(inputs).numpy()
        return kept, probabilities

    def whole(self, networks: Networks, lay: Plan, rows: Rows, batch: Sequence[Features]) -> list[Float32]:
        """Probabilities [K, T] of each of several requests' items, laid out together, from one forward pass of the whole network."""
        deep, wide = map(torch.from_numpy, rows)
        with torch.inference_mode():
            inputs = ranker_inputs(self._schema, lay, deep, wide, self._dim)
            probabilities: Float32 = networks.ranker.eval().predict(inputs).numpy()
        counts = np.cumsum([len(features.item_keys) for features in batch])[:-1]
        return list(np.split(probabilities, counts))
