"""Whether what is learned predicts well enough to be served: judged by the loss of each label before it is learned.

A task is judged by its last `training.hold_examples` labels. Once it did no worse than always predicting their rate, it is held back
when its loss exceeds that constant's by `training.hold_margin`, and served again when it is no worse than the constant, or than the
predictions that were served meanwhile, for the same labels. Nothing is held back before it was good once: there is nothing better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recsys.config import Config
from recsys.types import Bool, Float32

BUCKETS = 20
"""Parts of a window that leave it at once: more follow the loss more closely and cost more a step."""
MOST = 8.0
"""Of one label, natural logarithm: a few requests that nobody could predict must not look like a bad model; of a network that broke
every label costs as much."""
ADOPTED_MS = 5000
"""Answers that are so much later are taken to be made with what is served since a model was held back: rows reach them in a tenth of a
second, networks in half a second, a table of millions of rows, which is published whole then, in seconds."""
SKIPPED = 20
"""Batches in a row that were not learned because a gradient was not finite: one request that cannot be learned spoils one batch."""
FEWEST = 20
"""Labels of either kind without which a window says nothing: of a calibrated model the loss of 1,000 labels with 5 positives was above
the margin of .1 in 57 of 11,023 draws, with 10 in 3 of 10,441, with 20 in none of 9,617."""


class Loss(NamedTuple):
    """Of some labels of one task: how many, how many positive, and the summed loss of the trainer's own predictions before it learned
    them, of choosing among a request's items evenly, and of the predictions that were served (0: not known)."""

    labels: float = 0.0
    positives: float = 0.0
    own: float = 0.0
    even: float = 0.0
    served: float = 0.0


class Worse(NamedTuple):
    """After how many labels of its task a model began to be bad, and the log time when that was known."""

    labels: int
    since_ms: int


class Guard:
    """Pure: decided by what is passed in. Not thread-safe."""

    def __init__(self, config: Config) -> None:
        self._names = tuple(task.name for task in config.tasks)
        self._judged = [task.labels == "window" for task in config.tasks]
        self._choice = [task.loss == "softmax" for task in config.tasks]
        self._size, self._margin = config.training.hold_examples, config.training.hold_margin
        self._windows: dict[str, list[Loss]] = {name: [] for name in self._names}
        self._good: set[str] = set()
        """Tasks that were no worse than the constant since they were last held back."""
        self.worse: dict[str, Worse] = {}
        """Tasks because of which nothing is published."""
        self._skipped: dict[str, int] = dict.fromkeys(self._names, 0)
        """Batches in a row that could not be learned."""
        self.judged: dict[str, int] = dict.fromkeys(self._names, 0)
        """Labels of each task that were looked at."""

    def add(
        self,
        losses: Float32,
        labels: Bool,
        mask: Bool,
        served: Float32,
        requests: Sequence[tuple[int, int]],
        now_ms: int,
    ) -> None:
        """One batch of first emissions: the loss of each label, the labels, which of them were learned, and the served predictions
        [M, T]; of each of its requests, in order, how many items it has and its log time."""
        if not self._margin:
            return
        sizes, times_ms = (np.array(part, np.int64) for part in zip(*requests, strict=True))
        for task, name in enumerate(self._names):
            known = mask[:, task]
            if name in self.worse:  # only what was answered by what is served meanwhile compares
                known = known & np.repeat(times_ms > self.worse[name].since_ms + ADOPTED_MS, sizes)
            if not self._judged[task] or not known.any():
                continue
            found, even = labels[known, task], 0.0
            if self._choice[task]:
                even = float(np.repeat(np.log(np.maximum(sizes, 1)), sizes)[known][found].sum())
            loss = Loss(
                float(len(found)),
                float(found.sum()),
                float(losses[known, task].sum(dtype=np.float64)),
                even,
                0.0 if self._choice[task] else _log_loss(served[known, task], found),
            )
            self.judged[name] += len(found)
            self._skipped[name] = 0
            self._window(name, loss)
            self._judge(name, self._choice[task], now_ms)

    def skipped(self, tasks: Iterable[str], now_ms: int) -> None:
        """A batch was not learned: the gradient of these tasks was not finite."""
        for name in tasks:
            self._skipped[name] += 1
            if self._margin and self._skipped[name] >= SKIPPED and name in self._good:
                self._hold(name, Worse(self.judged[name], now_ms))

    def _hold(self, name: str, worse: Worse) -> None:
        self.worse[name] = worse
        self._good.discard(name)
        self._windows[name] = []

    def _window(self, name: str, loss: Loss) -> None:
        window = self._windows[name]
        if window and window[-1].labels < self._size / BUCKETS:
            loss = Loss(*map(sum, zip(window.pop(), loss, strict=True)))
        window.append(loss)
        while sum(part.labels for part in window[1:]) >= self._size:
            del window[0]

    def _judge(self, name: str, choice: bool, now_ms: int) -> None:
        sums = Loss(*map(sum, zip(*self._windows[name], strict=True)))
        negatives = sums.labels - sums.positives
        if sums.labels < self._size or min(sums.positives, negatives) < FEWEST:
            return
        constant = sums.even if choice else _entropy(sums.positives, negatives)
        if name in self.worse:
            if sums.own <= max(constant, sums.served):
                del self.worse[name]
                self._windows[name] = []
        elif name in self._good and sums.own > (1 + self._margin) * constant:
            self._hold(name, Worse(self.judged[name] - self._bad_labels(name, constant / sums.labels), now_ms))
        elif sums.own <= constant:
            self._good.add(name)

    def _bad_labels(self, name: str, constant: float) -> int:
        """How many of the newest labels are in parts of the window that cost more than the constant does by label."""
        found = 0.0
        for part in reversed(self._windows[name]):
            if part.own <= (1 + self._margin) * constant * part.labels:
                break
            found += part.labels
        return int(found)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        return {
            "windows": {name: [list(part) for part in window] for name, window in self._windows.items()},
            "good": sorted(self._good),
            "worse": {name: list(worse) for name, worse in self.worse.items()},
            "judged": self.judged,
            "skipped": self._skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned; a task that it does not know is judged from now on."""
        self._windows = {name: [Loss(*part) for part in state["windows"].get(name, ())] for name in self._names}
        self._good = set(self._names) & set(state["good"])
        self.worse = {name: Worse(*worse) for name, worse in state["worse"].items() if name in self._names}
        self.judged, self._skipped = ({n: state[key].get(n, 0) for n in self._names} for key in ("judged", "skipped"))


def _log_loss(predictions: Float32, labels: Bool) -> float:
    """Summed over labels [K] of which the predictions are known, and as much for each of the others."""
    known = np.isfinite(predictions)
    if not known.any():
        return 0.0
    p = np.clip(predictions[known].astype(np.float64), math.exp(-MOST), 1 - math.exp(-MOST))
    loss = -np.where(labels[known], np.log(p), np.log1p(-p)).sum()
    return float(loss) * len(labels) / int(known.sum())


def _entropy(positives: float, negatives: float) -> float:
    """The summed loss of always predicting the labels' own rate."""
    labels = positives + negatives
    return -(positives * math.log(positives / labels) + negatives * math.log(negatives / labels))
