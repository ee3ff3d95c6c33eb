"""One gradient step: rows by the table's optimisers, dense weights by Adam, both from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recsys.config import Config
from recsys.features.build import Features
from recsys.features.schema import Schema
from recsys.model import build
from recsys.model.assemble import ranker_inputs
from recsys.model.plan import Block, plan
from recsys.model.ranker import loss
from recsys.table.tables import Tables
from recsys.types import Bool, Float32

_CLIP_NORM = 10.0
"""Largest norm of the dense gradient; half slows the first minutes, double lets one odd batch move everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """M items of R requests: labels [M, T], mask [M, T] of final labels, first [R]: whether the request is counted."""

    features: Sequence[Features]
    labels: Bool
    mask: Bool
    first: Bool


class Learner:
    """The ranker and its rows, learning. Not thread-safe."""

    def __init__(self, config: Config, schema: Schema, tables: Tables) -> None:
        self._schema = schema
        self._dim = config.model.dim
        self.tables = tables
        self.model = build.ranker(config, schema)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.model.dense_learning_rate)
        self.skipped = 0

    def learn(self, batch: Batch, now_ms: int) -> bool:
        """One step; False when the gradient was not finite and nothing was changed but admission counts."""
        lay = plan(self._schema, batch.features)
        admit = bool(batch.first.any())
        deep, wide = (self._rows(block, now_ms, admit) for block in (lay.deep, lay.wide))
        self.model.train(admit)
        logits = self.model(ranker_inputs(self._schema, lay, deep, wide, self._dim))
        labels, mask = torch.from_numpy(batch.labels.astype(np.float32)), torch.from_numpy(batch.mask)
        mean = loss(logits, labels, mask, torch.ones(len(labels)))
        self.optimizer.zero_grad(set_to_none=True)
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        gradients = [_gradient(rows, len(labels)) for rows in (deep, wide)]
        if not (torch.isfinite(norm) and all(np.isfinite(g).all() for g in gradients)):
            self.skipped += 1
            return False
        self.optimizer.step()
        for block, gradient in zip((lay.deep, lay.wide), gradients, strict=True):
            self.tables[block.layout].apply_gradients(block.slots, block.keys, gradient, now_ms)
        return True

    def predict(self, features: Sequence[Features]) -> Float32:
        """Probabilities [M, T] in eval mode; nothing is counted or created."""
        lay = plan(self._schema, features)
        deep, wide = (torch.from_numpy(self.tables[b.layout].lookup(b.slots, b.keys)[0]) for b in (lay.deep, lay.wide))
        self.model.eval()
        with torch.inference_mode():
            logits = self.model(ranker_inputs(self._schema, lay, deep, wide, self._dim))
            probabilities: Float32 = torch.sigmoid(logits).numpy()
        return probabilities

    def _rows(self, block: Block, now_ms: int, admit: bool) -> torch.Tensor:
        values = self.tables[block.layout].lookup_train(block.slots, block.keys, now_ms, admit)
        return torch.from_numpy(values).requires_grad_()


def _gradient(rows: torch.Tensor, num_examples: int) -> Float32:
    """Gradient of the summed loss: Adagrad's rows see single examples, whatever the batch size."""
    if rows.grad is None:
        return np.zeros(rows.shape, np.float32)
    gradient: Float32 = rows.grad.numpy() * num_examples
    return gradient
