"""One gradient step: rows by the table's optimisers, dense weights by their own, both from one backward pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recsys.compiled import one_at_a_time
from recsys.config import Config, TaskConfig, parse
from recsys.features.build import Features, UserFeatures
from recsys.features.schema import Schema
from recsys.model import fused, networks
from recsys.model import loss_kernels as loss
from recsys.model.assemble import ranker_inputs
from recsys.model.home import Reading
from recsys.model.layouts import layouts
from recsys.model.learn_kernels import finite
from recsys.model.learning import Learning, Scored
from recsys.model.plan import Block, Plan, plan
from recsys.model.ranker import RankerInputs
from recsys.table.tables import Tables
from recsys.training import dense
from recsys.training.delayed import helpers
from recsys.training.dense import DenseOptimizer
from recsys.training.guard import MOST
from recsys.types import Bool, Float32, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """M items of R requests: labels [M, T], mask [M, T] of labels to train on, and whether its items are counted:
    all of a batch are in their first emission, or none."""

    features: Sequence[Features]
    labels: Bool
    mask: Bool
    first: bool


_compiled = threading.Event()


class Learner:
    """The ranker and its rows, learning. Not thread-safe. Waits for the compiled calls before it learns."""

    def __init__(self, config: Config, schema: Schema, tables: Tables) -> None:
        self._schema = schema
        self._dim, self._l2 = config.model.dim, config.model.row_l2
        self._batch_size = config.training.batch_size
        self.tables = tables
        self.model = networks.ranker(config, schema)
        self.optimizer = DenseOptimizer(self.model, config.model.dense_optimizer, config.model.dense_learning_rate)
        self._network = Learning(schema, self.model)
        self._objective = objective(config.tasks)
        self._last: Sequence[Features] = ()
        self.losses: Float32 = np.zeros((0, len(schema.tasks)), np.float32)
        """Of each label of the last batch before it was learned [M, T], `guard.MOST` at most."""

    def learn(self, batch: Batch, now_ms: int) -> tuple[str, ...]:
        """One step. When the gradient is not finite nothing is changed but admission counts and running statistics, and the
        tasks it came from are named."""
        if not ready():
            warm_up()
        return self._learn(batch, now_ms)

    def _learn(self, batch: Batch, now_ms: int) -> tuple[str, ...]:
        lay, count = plan(self._schema, batch.features), len(batch.labels)
        admit = batch.first
        deep, wide = (self._rows(block, now_ms, admit) for block in (lay.deep, lay.wide))
        scored = self._network.scores(lay, deep, wide, admit)
        odds, losses, weights, back = (np.empty_like(scored.logits) for _ in range(4))
        loss.log_odds(self._objective, scored.logits, odds)
        loss.losses(self._objective, odds, batch.labels, batch.mask, lay.request, (losses, weights, back))
        self.losses = np.minimum(losses, np.float32(MOST))
        back /= np.float32(count)
        rows = deep, wide
        if not self._gradients(scored, back, rows):
            return self._culprits(scored, losses * weights, back, rows)
        gradients = self._found
        if self._l2:
            regularise(gradients[0], deep, _occurrences(lay) * admit, self._dim, self._l2)
        self._observe(scored, batch, weights)
        self.optimizer.step(min(1.0, count / self._batch_size), self._norm)
        for block, gradient in zip((lay.deep, lay.wide), gradients, strict=True):
            self.tables[block.layout].apply_gradients(block.slots, block.keys, gradient, now_ms)
        self._last = batch.features
        return ()

    def _gradients(self, scored: Scored, by_odds: Float32, rows: tuple[Float32, Float32]) -> bool:
        """Compute the gradients, by the log-odds' [M, T]: whether all are finite."""
        glogits = by_odds.copy()
        loss.log_odds_back(self._objective, scored.logits, glogits)
        found = self._network.gradients(scored, glogits, *rows)
        for gradient in found:
            gradient *= np.float32(
                len(glogits)
            )  # of the summed loss: Adagrad's rows see single examples, whatever the batch size
        self._found, self._norm = found, self.optimizer.norm()
        return math.isfinite(self._norm) and all(finite(gradient.reshape(-1)) for gradient in found)

    def _observe(self, scored: Scored, batch: Batch, weights: Float32) -> None:
        """The correctors are a few operations of torch, where they are configured."""
        if self.model.calibrator is not None or self.model.memory is not None:
            labels = batch.labels.astype(np.float32)
            given = scored.logits, scored.hidden, labels, weights * batch.mask
            self.model.observe(*(torch.from_numpy(array) for array in given))

    def _culprits(
        self, scored: Scored, losses: Float32, by_odds: Float32, rows: tuple[Float32, Float32]
    ) -> tuple[str, ...]:
        """The tasks whose loss is not finite; else those whose own gradient is not; all when it takes several of them."""
        tasks = self._schema.tasks
        found = [task for task, each in zip(tasks, losses.sum(0).tolist(), strict=True) if not math.isfinite(each)]
        if found:
            return tuple(found)
        for number, task in enumerate(tasks):
            alone = np.zeros_like(by_odds)
            alone[:, number] = by_odds[:, number]
            if not self._gradients(scored, alone, rows):
                found.append(task)
        return tuple(found) or tasks

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

    def _rows(self, block: Block, now_ms: int, admit: bool) -> Float32:
        return self.tables[block.layout].lookup_train(block.slots, block.keys, now_ms, admit)


def ready() -> bool:
    """Whether a step waits for no compiler."""
    return _compiled.is_set()


def warm_up() -> None:
    """Compile what a step calls, or read it from the on-disk cache."""
    fused.warm_up()
    with one_at_a_time("learning"):
        dense.warm_up()
        config = parse({"table": {"capacity": 1000}})
        schema = Schema.of(config)
        Learner(config, schema, Tables(layouts(config, schema)))._learn(_any_batch(schema), 0)
    _compiled.set()


def _any_batch(schema: Schema) -> Batch:
    def block(name: str, slots: Int32, *shape: int) -> dict[str, Any]:
        shape = (*shape, len(slots))
        return {f"{name}_keys": np.ones(shape, np.int64), f"{name}_mask": np.ones(shape, np.bool_)}

    user = UserFeatures(
        **block("shared", schema.shared_slots),
        **block("history", schema.history_slots, 1),
        history_kinds=np.ones(1, np.uint8),
        history_gaps=np.zeros(1, np.uint8),
    )
    numbers = np.zeros((1, len(schema.numbers)), np.float32)
    items, crosses = block("item", schema.item_slots, 1), block("cross", schema.cross_slots, 1)
    labels = np.ones((1, len(schema.tasks)), np.bool_)
    features = [Features(user=user, **items, **crosses, numbers=numbers)]
    return Batch(features=features, labels=labels, mask=labels, first=True)


def objective(tasks: Sequence[TaskConfig]) -> loss.Objective:
    """What is learned of each task."""
    names = [task.name for task in tasks]
    late, never = np.full((2, len(tasks)), -1)
    for task, *places in helpers(tasks):
        late[task], never[task] = places
    return loss.Objective(
        weight=np.array([task.loss_weight for task in tasks], np.float64),
        after=np.array([names.index(task.after) if task.after else -1 for task in tasks]),
        choice=np.array([task.loss == "softmax" for task in tasks]),
        fnw=np.array([task.labels == "fnw" for task in tasks]),
        late=late,
        never=never,
    )


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
