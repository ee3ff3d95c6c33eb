"""Scoring one request without torch: a ranker's weights as flat arrays, and what the light stage and the whole network say of its items.

Equal to `Ranker.predict` but for rounding: `tests/unit/test_model_scoring.py`. Legend: as in `score_kernels.py`; U unique rows.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from recsys import metrics
from recsys.compiled import one_at_a_time
from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import gather, packed, plain, specs, weights
from recsys.model import score_kernels as kernels
from recsys.model.plain import sigmoid
from recsys.model.plan import Index, Plan
from recsys.model.row_fields import fields_of, starts, summed
from recsys.model.specs import CERTAIN, MEMORY, MEMORY_SHRINK, NUMBER_LIMIT, RankerSpec
from recsys.model.weights import Weights, part
from recsys.types import Float32

Array = np.ndarray[Any, Any]
compiled = threading.Event()
"""Set once no call of these kernels waits for a compiler."""


class Scores(Protocol):
    """What says how probable each task of an item is. Thread-safe."""

    def light(self, lay: Plan, deep: Float32, wide: Float32) -> Float32:
        """What the wide part says of each item: rows deep [U, d + tasks …] and wide [U', tasks] of requests laid out -> logits [M, T]."""
        ...

    def predict(self, lay: Plan, deep: Float32, light: Float32) -> Float32:
        """The probabilities [M, T] of the items of requests laid out, by the whole network; `light` [M, T] are their wide logits."""
        ...

    def probabilities(self, logits: Float32) -> Float32:
        """Of the tasks, from the network's logits [M, T]."""
        ...


def lacking(config: Config) -> str:
    """What of a configuration's network the kernels have no code for, so that torch scores its requests; empty: nothing."""
    return packed.unknown(specs.ranker(config, Schema.of(config)))


def scores_of(config: Config, schema: Schema, given: Weights | None) -> Scores:
    """What scores with these weights (None: untrained): the kernels; torch, where they have no code for a part of the network."""
    spec = specs.ranker(config, schema)
    if packed.unknown(spec):
        from recsys.model.torch_scoring import TorchScoring  # the one place where scoring brings torch

        return TorchScoring(config, schema, given)
    return Scoring(schema, spec, weights.of_ranker(spec, seed=config.seed) if given is None else given)


def checked(config: Config, schema: Schema, given: Weights) -> Weights:
    """Weights that came from elsewhere, copied. SchemaMismatch where they are not those of the configured ranker."""
    spec = specs.ranker(config, schema)
    if packed.unknown(spec):
        return given  # torch says so itself
    return weights.fitted(given, weights.of_ranker(spec, seed=config.seed))


class Scoring:
    """A ranker's weights as they are now. Thread-safe: nothing here changes."""

    def __init__(self, schema: Schema, spec: RankerSpec, given: Weights) -> None:
        self._spec, self._dim, self._tasks = spec, spec.dim, len(spec.tasks)
        self._fields = starts(schema.item_fields)
        self._past = starts(schema.item_fields[: schema.num_history_fields])
        self._bias, self._number_weights = given["bias"], given["number_weights"]
        self._numbers = packed.affine(part(given, "number_norm."))
        self._attention = [packed.attention(spec, part(given, f"attention.{n}.")) for n in range(spec.sequences)]
        self._compress = given.get("compress")
        self._meta, self._task, self._towers = packed.home(spec, part(given, "home."))
        self._calibrate = given["calibrator.coefficients"].astype(np.float32).T if spec.calibrate else None
        self._memory = (given["memory.sums"], given[weights.PROJECTIONS]) if spec.error_memory else None

    def light(self, lay: Plan, deep: Float32, wide: Float32) -> Float32:
        """As `Scores.light`."""
        sums = summed(lay, deep, wide, self._dim, _columns())
        return np.asarray(lay.numbers @ self._number_weights + self._bias + sums, np.float32)

    def predict(self, lay: Plan, deep: Float32, light: Float32) -> Float32:
        """As `Scores.predict`."""
        shared = take(deep, lay.shared, np.arange(lay.shared.shape[1] + 1), self._dim)
        history = take(deep, lay.history, self._past, self._dim)
        items = take(deep, lay.item, self._fields, self._dim)
        self._check(lay.history_masks)
        x = np.empty((len(items), self._meta.first.shape[1]), np.float32)
        bounds = np.searchsorted(lay.request, np.arange(len(shared) + 1)).tolist()
        for request, (start, stop) in enumerate(pairwise(bounds)):
            if start == stop:
                continue
            own, masks = items[start:stop], lay.history_masks[:, request]
            gaps, present = lay.history_gaps[request].astype(np.int64), masks.any(0)
            pooled = self._pooled(own, history[request], masks, gaps)
            mean = present.astype(np.float32) @ history[request] / np.float32(max(1, present.sum()))
            user = np.concatenate([shared[request], mean])
            self._compose(user, pooled, own, lay.numbers[start:stop], x[start:stop])
        hidden = np.empty((self._tasks, len(x), self._meta.affine.shape[2]), np.float32)
        logits = np.empty((len(x), self._tasks), np.float32)
        _network().head(x, self._meta, self._task, self._towers, hidden, logits)
        return self._corrected(logits + light, hidden)

    def _pooled(self, items: Float32, history: Float32, masks: Array, gaps: Array) -> Float32:
        """The history for each item, by the attention of each sequence [S, M, D]."""
        candidates = np.ascontiguousarray(items[:, : history.shape[1]])
        pooled = np.empty((len(masks), *candidates.shape), np.float32)
        for out, attention, mask in zip(pooled, self._attention, masks, strict=True):
            _network().attend(attention, candidates, history, mask, gaps, out)
        return pooled

    def probabilities(self, logits: Float32) -> Float32:
        """As `Scores.probabilities`."""
        return sigmoid(self._log_odds(logits))

    def _check(self, masks: Array) -> None:
        longest = int(masks.sum(2).max()) if masks.size else 0
        for attention in self._attention:
            if len(attention.candidate) and longest > len(attention.rank):
                raise ValueError(
                    f"history has {longest} entries, the attention knows {len(attention.rank)}: cut it to the newest"
                )

    def _compose(self, user: Float32, pooled: Float32, items: Float32, numbers: Float32, out: Float32) -> None:
        """HoME's input [M, V]."""
        if self._compress is None:
            _network().compose(user, pooled, items, numbers, self._numbers, NUMBER_LIMIT, out)
            return
        width = len(pooled) * pooled.shape[2] + items.shape[1] + numbers.shape[1]
        own = np.empty((len(items), width), np.float32)
        _network().compose(user[:0], pooled, items, numbers, self._numbers, NUMBER_LIMIT, own)
        np.matmul(own, self._compress[len(user) :], out=out)
        out += user @ self._compress[: len(user)]

    def _log_odds(self, logits: Float32) -> Float32:
        """As `Ranker.log_odds`."""
        after = self._spec.after
        if not any(parent >= 0 for parent in after):
            return logits
        logs = -np.logaddexp(0, -logits)
        for task, parent in enumerate(after):
            if parent >= 0:
                logs[:, task] += logs[:, parent]
        logs = np.minimum(logs, -CERTAIN)
        return np.where(np.array(after) >= 0, logs - np.log(-np.expm1(logs)), logits)

    def _corrected(self, logits: Float32, hidden: Float32) -> Float32:
        """Probabilities to serve, as `Calibrator` and `ErrorMemory` correct them, where they are configured."""
        log_odds = self._log_odds(logits)
        if self._calibrate is not None:
            log_odds = log_odds * self._calibrate[0] + self._calibrate[1]
        p = sigmoid(log_odds)
        if self._memory is None:
            return p
        sums, projections = self._memory
        keys = hidden.swapaxes(0, 1).reshape(len(p), -1)
        signs = (keys - keys.mean(1, keepdims=True)) @ projections > 0
        buckets = signs.reshape(-1, *MEMORY) @ (1 << np.arange(MEMORY[1]))
        count, labels, predicted = np.moveaxis(sums[np.arange(MEMORY[0]), buckets], 3, 0)
        error = ((labels - predicted) / (count + np.float32(MEMORY_SHRINK))).mean(1)
        return np.clip(p + np.float32(self._spec.error_memory) * error, 0, 1)


def _columns() -> Any:
    return gather if compiled.is_set() else plain


def _network() -> Any:
    return kernels if compiled.is_set() else plain


def take(rows: Float32, index: Index, fields: Index, dim: int) -> Float32:
    """Fields of looked-up rows, side by side: index [..., C] -> [..., F d]."""
    return fields_of(rows, index, fields, dim, _columns())


def warm_up() -> None:
    """Compile every kernel of a request, or read it from the on-disk cache."""
    started = time.perf_counter()
    spec = RankerSpec(
        num_shared=1,
        num_item=1,
        num_history=1,
        history_len=1,
        dim=1,
        num_numbers=1,
        tasks=("click",),
        groups=("",),
        number_prior=(0.0,),
        task_prior=(0.5,),
    )
    given, one = weights.of_ranker(spec, seed=0), np.ones((1, 1), np.float32)
    index = np.zeros((1, 1), np.intp)
    with one_at_a_time("scoring"):
        gather.warm_up()
        kernels.attend(
            packed.attention(spec, part(given, "attention.0.")), one, one, np.ones(1, np.bool_), index[0], one.copy()
        )
        meta, task, towers = packed.home(spec, part(given, "home."))
        x = np.empty((1, meta.first.shape[1]), np.float32)
        kernels.compose(one[0].repeat(2), one[None], one, one, np.ones((2, 1), np.float32), NUMBER_LIMIT, x)
        kernels.head(x, meta, task, towers, np.empty((1, 1, meta.affine.shape[2]), np.float32), one.copy())
    seconds = time.perf_counter() - started
    if not compiled.is_set():
        metrics.COMPILE_SECONDS.set(seconds)
        logging.getLogger("recsys").info("scoring compiled after %.1f s", seconds)
    compiled.set()
