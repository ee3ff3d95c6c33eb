"""One gradient step: rows by the table's optimisers, dense weights by their own, both from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from recsys.config import Config
from recsys.features.build import Features
from recsys.features.schema import Schema
from recsys.model import build, fused
from recsys.model.assemble import ranker_inputs
from recsys.model.home import Reading
from recsys.model.plan import Block, Plan, plan
from recsys.model.ranker import RankerInputs, choices, label_losses
from recsys.table.tables import Tables
from recsys.training.delayed import Importance
from recsys.training.dense import DenseOptimizer
from recsys.training.guard import MOST
from recsys.types import Bool, Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """M items of R requests: labels [M, T], mask [M, T] of labels to train on, and whether its items are counted:
    all of a batch are in their first emission, or none."""

    features: Sequence[Features]
    labels: Bool
    mask: Bool
    first: bool


class Learner:
    """The ranker and its rows, learning. Not thread-safe. Waits for the fused operations before it learns."""

    def __init__(self, config: Config, schema: Schema, tables: Tables) -> None:
        self._schema = schema
        self._dim, self._l2 = config.model.dim, config.model.row_l2
        self._batch_size = config.training.batch_size
        self.tables = tables
        self.model = build.ranker(config, schema)
        self.optimizer = DenseOptimizer(self.model, config.model.dense_optimizer, config.model.dense_learning_rate)
        self._importance = Importance(config.tasks)
        self._choice = torch.tensor([task.loss == "softmax" for task in config.tasks])
        self._last: Sequence[Features] = ()
        self.losses: Float32 = np.zeros((0, len(schema.tasks)), np.float32)
        """Of each label of the last batch before it was learned [M, T], `guard.MOST` at most."""

    def learn(self, batch: Batch, now_ms: int) -> tuple[str, ...]:
        """One step. When the gradient is not finite nothing is changed but admission counts and running statistics, and the
        tasks it came from are named."""
        if not fused.ready():
            fused.warm_up()
        lay = plan(self._schema, batch.features)
        admit = batch.first
        deep, wide = (self._rows(block, now_ms, admit) for block in (lay.deep, lay.wide))
        self.model.train(admit)
        logits, hidden = self.model.scores(ranker_inputs(self._schema, lay, deep, wide, self._dim))
        labels, mask = torch.from_numpy(batch.labels.astype(np.float32)), torch.from_numpy(batch.mask)
        log_odds = self.model.log_odds(logits)
        weights = self._importance.weights(torch.sigmoid(log_odds), labels)
        losses = self._losses(log_odds, labels, mask, torch.from_numpy(lay.request))
        self.losses = losses.detach().clamp(max=MOST).numpy()
        each = (losses * weights).sum(0) / len(labels)
        self.optimizer.zero()
        each.sum().backward(retain_graph=True)
        gradients = [_gradient(rows, len(labels)) for rows in (deep, wide)]
        if not self._finite(gradients):
            return self._culprits(each, (deep, wide))
        if self._l2:
            regularise(gradients[0], deep.detach().numpy(), _occurrences(lay) * admit, self._dim, self._l2)
        self.model.observe(logits, hidden, labels, weights * mask)
        self.optimizer.step(min(1.0, len(labels) / self._batch_size))
        for block, gradient in zip((lay.deep, lay.wide), gradients, strict=True):
            self.tables[block.layout].apply_gradients(block.slots, block.keys, gradient, now_ms)
        self._last = batch.features
        return ()

    def _losses(
        self, log_odds: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, request: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each label [M, T], 0 where it is not known: cross-entropy; of a task that is a choice, that of choosing the item
        among those of its request."""
        each = label_losses(log_odds, labels, mask)
        if not self._choice.any():
            return each
        return torch.where(self._choice, -torch.where(mask, labels, 0.0) * choices(log_odds, request), each)

    def _finite(self, gradients: Sequence[Float32]) -> bool:
        return bool(torch.isfinite(self.optimizer.gradient).all()) and all(np.isfinite(g).all() for g in gradients)

    def _culprits(self, each: torch.Tensor, rows: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """The tasks whose loss is not finite; else those whose own gradient is not; all when it takes several of them."""
        found = [task for task, loss in zip(self._schema.tasks, each.tolist(), strict=True) if not math.isfinite(loss)]
        if found:
            return tuple(found)
        for task, loss in zip(self._schema.tasks, each, strict=True):
            self.optimizer.zero()
            for tensor in rows:
                tensor.grad = None
            loss.backward(retain_graph=True)
            if not self._finite([_gradient(tensor, 1) for tensor in rows]):
                found.append(task)
        self.optimizer.zero()
        return tuple(found) or self._schema.tasks

    def predict(self, features: Sequence[Features]) -> Float32:
        """Probabilities [M, T] in eval mode; nothing is counted or created."""
        with torch.inference_mode():
            probabilities: Float32 = self.model.predict(self._serving_inputs(features)).numpy()
        return probabilities

    def readings(self) -> list[Reading]:
        """How gates and experts fare on the last batch that was learned; empty before the first."""
        if not self._last:
            return []
        with torch.inference_mode():
            return self.model.readings(self._serving_inputs(self._last))

    def _serving_inputs(self, features: Sequence[Features]) -> RankerInputs:
        self.model.eval()
        lay = plan(self._schema, features)
        deep, wide = (torch.from_numpy(self.tables[b.layout].lookup(b.slots, b.keys)[0]) for b in (lay.deep, lay.wide))
        return ranker_inputs(self._schema, lay, deep, wide, self._dim)

    def _rows(self, block: Block, now_ms: int, admit: bool) -> torch.Tensor:
        values = self.tables[block.layout].lookup_train(block.slots, block.keys, now_ms, admit)
        return torch.from_numpy(values).requires_grad_()


def _gradient(rows: torch.Tensor, num_examples: int) -> Float32:
    """Gradient of the summed loss: Adagrad's rows see single examples, whatever the batch size."""
    if rows.grad is None:
        return np.zeros(rows.shape, np.float32)
    gradient: Float32 = rows.grad.numpy() * num_examples
    return gradient


def _occurrences(lay: Plan) -> npt.NDArray[np.int64]:
    """How often each unique deep row occurs in the batch [U]."""
    size = len(lay.deep.keys)
    every = np.concatenate([lay.shared.ravel(), lay.history.ravel(), lay.item.ravel()])
    return np.bincount(every, minlength=size + 1)[:size]


def regularise(gradient: Float32, rows: Float32, occurrences: npt.NDArray[np.int64], dim: int, l2: float) -> None:
    """Mini-batch aware L2 (Zhou et al. 2018, section 4.3), in place: gradient += l2 / n * row for each row of the batch.

    gradient and rows [U, W]: an embedding of `dim` values first, and how often the row occurred before, n, last; its
    gradient is set so that plain SGD of rate 1 counts the `occurrences` [U] of this batch, which n includes.
    """
    seen = np.maximum(rows[:, -1] + occurrences, 1.0)
    gradient[:, :dim] += (l2 / seen)[:, None] * rows[:, :dim] * (occurrences > 0)[:, None]
    gradient[:, -1] = -occurrences
