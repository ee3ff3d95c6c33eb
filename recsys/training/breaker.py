"""The breaker: learning stops when the stream of feedback is visibly broken, and waits for `recsys trainer resume`.

What it judges is the log, by log time: a burst of requests, late feedback or a slow reader are load, and no evidence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from recsys.config import Config
from recsys.training.commands import SKIP

_MAX_SECONDS = 4096
"""Seconds that are counted apart; of more the oldest count together."""


class Breaker:
    """Pure: everything is decided by what is passed in. Not thread-safe.

    It opens when, of the last `breaker_examples` labels of the first task, the share of positives is at or above the upper bound; or
    at or below the lower one, and so is the share of feedback of its types among items shown, since the first of these labels' impressions.
    Feedback that comes, whatever becomes of it, says that the stream is not broken: answers that nobody waited for are load.
    """

    def __init__(self, config: Config) -> None:
        training = config.training
        self._examples, (self._low, self._high) = training.breaker_examples, training.breaker_rate
        self._types = frozenset(config.tasks[0].types)
        self.is_open = False
        self.skipping: dict[str, int] = {}
        """Up to these ends learning is left out: an operator said so."""
        self.resumed = ""
        """Name of the last command that was followed."""
        self._labels: deque[tuple[int, int, int]] = deque()
        """(labels, positives, log time of the impression), newest last."""
        self._num_labels = self._num_positives = 0
        self._seconds: deque[tuple[int, int, int]] = deque()
        """(second of log time, items shown, feedback of the first task's types)."""

    def shown(self, items: int, now_ms: int) -> None:
        """An impression of so many items came."""
        self._count(now_ms, items, 0)

    def arrived(self, kind: str, now_ms: int) -> None:
        """Feedback of a type came."""
        if kind in self._types:
            self._count(now_ms, 0, 1)

    def _count(self, now_ms: int, items: int, feedback: int) -> None:
        second = now_ms // 1000
        if self._seconds and self._seconds[-1][0] >= second:
            second, shown, arrived = self._seconds.pop()
            self._seconds.append((second, shown + items, arrived + feedback))
            return
        self._seconds.append((second, items, feedback))
        if len(self._seconds) > _MAX_SECONDS:
            (_, *first), (second, *then) = self._seconds.popleft(), self._seconds.popleft()
            self._seconds.appendleft((second, first[0] + then[0], first[1] + then[1]))

    def watch(self, labels: Iterable[tuple[int, int, int]]) -> None:
        """Labels of the first task became final: of each impression how many, how many positive, and its log time."""
        for each in labels:
            self._add(each, 1)
            self._labels.append(each)
        while self._labels and self._num_labels - self._labels[0][0] >= self._examples:
            self._add(self._labels.popleft(), -1)
        while self._seconds and self._labels and self._seconds[0][0] < self._labels[0][2] // 1000:
            self._seconds.popleft()
        if self._num_labels >= self._examples:
            rate = self._num_positives / self._num_labels
            self.is_open = rate >= self._high or (rate <= self._low and self._arriving() <= self._low)

    def _add(self, label: tuple[int, int, int], sign: int) -> None:
        self._num_labels += sign * label[0]
        self._num_positives += sign * label[1]

    def _arriving(self) -> float:
        shown, arrived = (sum(second[at] for second in self._seconds) for at in (1, 2))
        return arrived / shown if shown else float(arrived)

    def resume(self, how: Mapping[str, Any]) -> None:
        """Follow an operator's command: learn from what waited, or leave out what comes before `ends`."""
        self.resumed = how["name"]
        if how["how"] == SKIP:
            self.skipping = dict(how["ends"])
        else:
            self.close()

    def close(self) -> None:
        """Learning goes on, judged by what comes from now on."""
        self.is_open, self.skipping = False, {}
        self._labels.clear()
        self._seconds.clear()
        self._num_labels = self._num_positives = 0

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        return {
            "open": self.is_open,
            "skipping": self.skipping,
            "resumed": self.resumed,
            "labels": list(self._labels),
            "seconds": list(self._seconds),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.is_open, self.skipping, self.resumed = state["open"], dict(state["skipping"]), state["resumed"]
        self._labels = deque((n, k, time_ms) for n, k, time_ms in state["labels"])
        self._seconds = deque((second, shown, arrived) for second, shown, arrived in state["seconds"])
        self._num_labels, self._num_positives = (sum(label[at] for label in self._labels) for at in (0, 1))
