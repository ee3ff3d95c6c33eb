"""Scoring one request by torch: what serves a network that the kernels have no code for. Nothing else that serves brings torch."""

from __future__ import annotations

import torch

from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import networks
from recsys.model.assemble import deep_inputs, wide_sums
from recsys.model.plan import Plan
from recsys.model.weights import PROJECTIONS, Weights, fitted
from recsys.types import Float32


class TorchScoring:
    """As `Scores`."""

    def __init__(self, config: Config, schema: Schema, given: Weights | None) -> None:
        """SchemaMismatch where the weights (None: untrained) are not those of the configured ranker."""
        self._schema, self._dim = schema, config.model.dim
        self.ranker = networks.ranker(config, schema).eval()
        if given is not None:
            tensors = {n: torch.from_numpy(array) for n, array in fitted(given, networks.arrays(self.ranker)).items()}
            self.ranker.load_state_dict({name: tensor for name, tensor in tensors.items() if name != PROJECTIONS})

    def light(self, lay: Plan, deep: Float32, wide: Float32) -> Float32:
        """As `Scores.light`."""
        with torch.inference_mode():
            sums = wide_sums(self._schema, lay, torch.from_numpy(deep), torch.from_numpy(wide), self._dim)
            logits: Float32 = self.ranker.wide_logits(torch.from_numpy(lay.numbers), sums).numpy()
        return logits

    def predict(self, lay: Plan, deep: Float32, light: Float32) -> Float32:
        """As `Scores.predict`."""
        with torch.inference_mode():
            wide = torch.from_numpy(light)
            inputs = deep_inputs(self._schema, lay, torch.from_numpy(deep), wide, self._dim)
            logits, hidden = self.ranker.network(inputs)
            p: Float32 = self.ranker.corrected(wide + logits, hidden).numpy()
        return p

    def probabilities(self, logits: Float32) -> Float32:
        """As `Scores.probabilities`."""
        with torch.inference_mode():
            p: Float32 = self.ranker.probabilities(torch.from_numpy(logits)).numpy()
        return p
