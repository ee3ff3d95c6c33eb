"""The guard: a model that got bad is held back, a good one never, whatever the labels' noise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from recsys.config import parse
from recsys.training.guard import FEWEST, MOST, SKIPPED, Guard

RATE, SIZE, BATCH = 0.1, 1000, 50
LATE_MS = 10_000
"""Labels become final so much later."""


def guard(**more: Any) -> Guard:
    tasks = [{"name": "click", "types": ["click"]}]
    return Guard(parse({"tasks": tasks, "training": {"hold_examples": SIZE, **more}}))


class Stream:
    """Labels whose chances vary around a rate, and predictions of them."""

    def __init__(self, seed: int = 0, rate: float = RATE) -> None:
        self._rng, self._log_odds = np.random.default_rng(seed), np.log(rate / (1 - rate))
        self.now_ms = 10**12

    def feed(self, into: Guard, labels: int, *, wrong: float = 0.0, served_wrong: float | None = None) -> bool:
        """Predictions whose log-odds are off by `wrong`; whether it was held back meanwhile."""
        held = False
        for _ in range(labels // BATCH):
            odds = self._log_odds + self._rng.normal(0, 1, BATCH)
            found = self._rng.random(BATCH) < 1 / (1 + np.exp(-odds))
            p, served = (
                1 / (1 + np.exp(-(odds + off))) for off in (wrong, wrong if served_wrong is None else served_wrong)
            )
            losses = np.minimum(-np.where(found, np.log(p), np.log1p(-p)), MOST).astype(np.float32)
            self.now_ms += 1000
            into.add(
                losses[:, None],
                found[:, None],
                np.ones((BATCH, 1), np.bool_),
                served[:, None].astype(np.float32),
                [(BATCH // 2, self.now_ms - LATE_MS), (BATCH // 2, self.now_ms - LATE_MS)],
                self.now_ms,
            )
            held |= bool(into.worse)
        return held


def test_a_model_that_got_bad_is_held_back_and_served_again_when_it_is_good() -> None:
    one, stream = guard(), Stream()
    assert not stream.feed(one, 3 * SIZE)
    assert stream.feed(one, SIZE // 2, wrong=4.0) and set(one.worse) == {"click"}
    assert 3 * SIZE - BATCH <= one.worse["click"].labels <= 3 * SIZE + SIZE // 10, "since the labels that were bad"
    stream.feed(one, LATE_MS // 1000 * BATCH, wrong=4.0)  # shown before: by the bad one
    stream.feed(one, 2 * SIZE, wrong=4.0, served_wrong=0.0)
    assert one.worse, "as long as it is bad"
    stream.feed(one, 2 * SIZE)
    assert not one.worse


def test_a_world_that_neither_predicts_is_learned_from_and_served() -> None:
    one, stream = guard(), Stream()
    stream.feed(one, 3 * SIZE)
    assert stream.feed(one, SIZE, wrong=4.0)
    stream.feed(one, 3 * SIZE, wrong=4.0)  # and so are the predictions of the last good one
    assert not one.worse


def test_what_was_never_good_is_not_held_back() -> None:
    assert not Stream().feed(guard(), 10 * SIZE, wrong=4.0)


def test_zero_lets_everything_through() -> None:
    one, stream = guard(hold_margin=0.0), Stream()
    stream.feed(one, 3 * SIZE)
    assert not stream.feed(one, 3 * SIZE, wrong=4.0)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_a_calibrated_model_is_not_held_back(rate: float) -> None:
    """Two hundred windows each: none of 600; at a true false-alarm rate of 1 in 100 that would be seen once in 400 runs of this test."""
    for seed in range(10):
        assert not Stream(seed, rate).feed(guard(), 20 * SIZE)


def test_labels_of_one_kind_say_nothing() -> None:
    one = guard()
    for _ in range(4 * SIZE // BATCH):
        labels = np.zeros((BATCH, 1), np.bool_)
        losses = np.full((BATCH, 1), MOST, np.float32)
        one.add(losses, labels, ~labels, labels.astype(np.float32), [(BATCH, 10**12)], 10**12)
    assert not one.worse and FEWEST > 0


def test_a_restart_goes_on_where_it_was() -> None:
    whole, stopped, streams = guard(), guard(), (Stream(3), Stream(3))
    for wrong in (0.0, 0.0, 4.0, 4.0, 0.0):
        for one, stream in zip((whole, stopped), streams, strict=True):
            stream.feed(one, SIZE - BATCH, wrong=wrong, served_wrong=0.0)
        state = json.loads(json.dumps(stopped.state()))
        stopped = guard()
        stopped.restore(state)
        assert stopped.state() == whole.state() and stopped.worse == whole.worse


def test_batches_that_cannot_be_learned_one_after_the_other_are_a_broken_model() -> None:
    one, stream = guard(), Stream()
    stream.feed(one, 3 * SIZE)
    for _ in range(SKIPPED - 1):
        one.skipped(["click"], 10**12)
    stream.feed(one, BATCH)
    assert not one.worse, "a hostile request now and then"
    for _ in range(SKIPPED):
        one.skipped(["click"], 10**12)
    assert one.worse["click"].labels == 3 * SIZE + BATCH
