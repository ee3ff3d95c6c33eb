"""Training the ranker on labels that were emitted, and judging what it predicted of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from recsys.features.build import Index, decode
from recsys.features.schema import Schema
from recsys.training.breaker import Breaker
from recsys.training.guard import Guard
from recsys.training.learner import Batch, Learner
from recsys.training.opened import Emission
from recsys.training.steps import REQUEST, StepReport, blaming

Examples = list[tuple[Emission, Index]]
"""Emissions, and the items of each that are learned."""


class EmissionLearner:
    """Learns a step's emissions with the ranker, and tells guard and breaker of them. Not thread-safe."""

    def __init__(self, schema: Schema, learner: Learner, guard: Guard, breaker: Breaker, batch_size: int) -> None:
        self._schema, self._learner, self._guard, self._breaker = schema, learner, guard, breaker
        self._batch_size = batch_size

    def learn(self, emissions: Sequence[Emission], report: StepReport, now_ms: int) -> None:
        """Train on what is to be trained on; judge by what is final."""
        for batch, first in batches(emissions, self._batch_size):
            self._learn_batch(batch, first, report, now_ms)
        known = [(emission, emission.shown & emission.final[:, 0]) for emission in emissions]
        self._breaker.watch(
            (int(final.sum()), int(emission.labels[final, 0].sum()), emission.time_ms)
            for emission, final in known
            if final.any()
        )

    def _learn_batch(self, batch: Examples, first: bool, report: StepReport, now_ms: int) -> None:
        labels = np.concatenate([e.labels[rows] for e, rows in batch])
        mask = np.concatenate([e.mask[rows] for e, rows in batch])
        with blaming(lambda: [REQUEST + emission.request_id for emission, _ in batch]):
            features = [decode(self._schema, e.features).take(rows) for e, rows in batch]
            culprits = self._learner.learn(Batch(features=features, labels=labels, mask=mask, first=first), now_ms)
        if first and not culprits:
            served = np.concatenate([e.predictions[rows] for e, rows in batch])
            requests = [(len(rows), e.time_ms) for e, rows in batch]
            self._guard.add(self._learner.losses, labels, mask, served, requests, now_ms)
        self._guard.skipped(culprits, now_ms)
        for task in culprits:
            report.skipped(task)


def batches(emissions: Sequence[Emission], batch_size: int) -> Iterator[tuple[Examples, bool]]:
    """Batches of at most `batch_size` items, never mixing first and later emissions of an item, and which of the two each is of."""
    batch: Examples = []
    size, last = 0, True
    for emission in emissions:
        trained = emission.shown & emission.mask.any(1)
        for first in (True, False):
            rows = np.flatnonzero(trained & (emission.first == first))
            if not len(rows):
                continue
            if batch and (first != last or size + len(rows) > batch_size):
                yield batch, last
                batch, size = [], 0
            batch.append((emission, rows))
            size, last = size + len(rows), first
    if batch:
        yield batch, last
