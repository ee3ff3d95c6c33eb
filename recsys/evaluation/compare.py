"""Two configurations over the same events, side by side: paired differences, and answers interleaved (team draft)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.config.tasks import LATE, NEVER
from recsys.errors import BadInput
from recsys.evaluation.bootstrap import Resamples, interval
from recsys.evaluation.click_log import ClickLog
from recsys.evaluation.measures import METRICS, NextItem, Progressive, differences
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Event, Options
from recsys.keys import cross, key_of
from recsys.training.opened import Emission
from recsys.types import Bool, Int64

Float64 = npt.NDArray[np.float64]
_LABELS = ("types", "min_value", "window_s")
"""What makes a task's labels."""


class _Watched(Replay):
    """A replay of which answers and predictions can be told apart, to be paired with another's."""

    def __init__(self, config: Config, options: Options, folder: Path) -> None:
        super().__init__(config, options, folder)
        self.answers = _LastAnswer()
        self.progressive = Progressive(())
        self._keys: dict[str, list[Int64]] = {task: [] for task in self.loop.schema.tasks}
        if isinstance(self.driver, ClickLog):
            self.driver.next_item = self.answers
        else:
            self.driver.on_scored, self.progressive = self._scored, self.driver.progressive

    def _scored(self, emission: Emission) -> None:
        request = np.array([key_of(emission.request_id)])
        for task, name in enumerate(self.loop.schema.tasks):
            self._keys[name].append(cross(request, np.flatnonzero(emission.final[:, task])))

    def keys(self, task: str) -> Int64:
        """Which request and item each row of `progressive.rows(task)` is of."""
        return np.concatenate([np.zeros(0, np.int64), *self._keys[task]])


class _LastAnswer(NextItem):
    """Knows what was shown before the last click."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: Sequence[str] | None = None

    def add(self, shown: Sequence[str], clicked: str, user: int, candidates: Bool) -> None:
        super().add(shown, clicked, user, candidates)
        self.shown = shown


class Comparison:
    """One run of two configurations, `a` and `b`."""

    def __init__(self, first: Config, second: Config, options: Options, folder: Path) -> None:
        self._options = options
        self._tasks = [] if options.click_log else common_tasks(first, second)
        self._a, self._b = (_Watched(config, options, folder / name) for config, name in ((first, "a"), (second, "b")))
        self._coins = np.random.default_rng(0)
        self._pairs: list[tuple[int, int, int, float]] = []
        """Of each answer: user, place of the clicked item in a's and b's list (0: not shown), who won (a: -1, b: 1)."""
        self._unpaired = 0

    @property
    def metrics(self) -> list[str]:
        """Names of what can decide, the usual one first."""
        if self._options.click_log:
            return [f"hit_rate_at_{self._options.n}", f"mrr_at_{self._options.n}", "interleaved"]
        return [f"{task}.{name}" for task in self._tasks for name in METRICS if name != "calibration"]

    def run(self, events: Iterable[Event], on_progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
        """Replay all of them in both; `on_progress(events, event time)` now and then."""
        for event in events:
            if not (self._a.step(*event) and self._b.step(*event)):
                break
            self._pair(*event)
            if self._a.events % 2000 == 0:
                on_progress(self._a.events, event[0])
        result = {"a": self._a.finish(), "b": self._b.finish()}
        paired = self._next_item() if self._options.click_log else self._progressive()
        return result | {"paired": paired, "unpaired": self._unpaired}

    def _pair(self, now_ms: int, kind: str, message: Any) -> None:
        first, second = self._a.answers.shown, self._b.answers.shown
        self._a.answers.shown = self._b.answers.shown = None
        if first is None or second is None:
            self._unpaired += first is not second
            return
        clicked, n = message.item_id, self._options.n
        coins = self._coins.random(n) < 0.5
        won = (team_draft(first, second, clicked, coins) + team_draft(first, second, clicked, ~coins)) / 2
        self._pairs.append((key_of(message.user_id), place(first, clicked, n), place(second, clicked, n), won))

    def _next_item(self) -> dict[str, Any]:
        pairs = np.array(self._pairs, np.float64).reshape(-1, 4)
        users = np.array([pair[0] for pair in self._pairs], np.int64)
        places, won = pairs[:, 1:3].T, pairs[:, 3]
        hits, reciprocal = (places > 0).astype(np.float64), np.zeros(places.shape)
        np.divide(1.0, places, out=reciprocal, where=places > 0)
        drawn = Resamples(users) if len(users) else None
        n = self._options.n
        return {
            "predictions": len(users),
            "users": len(np.unique(users)),
            f"hit_rate_at_{n}": _means(hits[0], hits[1], drawn),
            f"mrr_at_{n}": _means(reciprocal[0], reciprocal[1], drawn),
            "interleaved": _means(np.maximum(-won, 0.0), np.maximum(won, 0.0), drawn),
        }

    def _progressive(self) -> dict[str, Any]:
        tasks = {}
        for task in self._tasks:
            first, second = self._a.keys(task), self._b.keys(task)
            both, at_first, at_second = np.intersect1d(first, second, return_indices=True)
            self._unpaired += len(first) + len(second) - 2 * len(both)
            rows = (self._a.progressive.rows(task)[at_first], self._b.progressive.rows(task)[at_second])
            tasks[task] = differences(*rows)
        return {"tasks": tasks}


def common_tasks(first: Config, second: Config) -> list[str]:
    """Tasks that both predict. BadInput when there is none, or when one is labelled otherwise in the other."""
    tasks = {task.name: task for task in second.tasks}
    found = []
    for task in first.tasks:
        other = tasks.get(task.name)
        if other is None or task.name.endswith((LATE, NEVER)):
            continue
        for option in _LABELS:
            ours, theirs = getattr(task, option), getattr(other, option)
            if ours != theirs:
                raise BadInput(
                    f"tasks: {option} of {task.name!r} is {ours} in the first configuration and {theirs} in the second: "
                    "predictions of different labels cannot be compared; make them equal (--label-delay sets the windows)",
                    field="tasks",
                )
        found.append(task.name)
    if not found:
        raise BadInput(
            f"tasks: the configurations share none, {[t.name for t in first.tasks]} and {list(tasks)}: name one alike",
            field="tasks",
        )
    return found


def place(shown: Sequence[str], clicked: str, n: int) -> int:
    """Place of the clicked item among the first `n`, from 1; 0: it is not there."""
    top = shown[:n]
    return top.index(clicked) + 1 if clicked in top else 0


def team_draft(first: Sequence[str], second: Sequence[str], clicked: str, coins: npt.NDArray[np.bool_]) -> int:
    """Who brings the clicked item to a list of len(coins) interleaved from two: -1 the first, 1 the second, 0 nobody.

    Team draft (Radlinski, Kurup and Joachims 2008): in each round both teams take their best item that is not taken yet, in an
    order that a coin tells (True: the second team goes first).
    """
    taken: set[str] = set()
    rest = iter(first), iter(second)
    for coin in coins:
        for team in (1, 0) if coin else (0, 1):
            pick = next((item for item in rest[team] if item not in taken), None)
            if pick is None:
                continue
            if pick == clicked:
                return 2 * team - 1
            taken.add(pick)
            if len(taken) == len(coins):
                return 0
    return 0


def _means(first: Float64, second: Float64, drawn: Resamples | None) -> dict[str, Any]:
    """Means of two values of the same answers [N] and of their difference, with its interval by bootstrap over users."""
    if drawn is None:
        return {"a": None, "b": None, "difference": None, "difference_ci": None}
    num = drawn.sums(np.ones(len(first)))
    return {
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": float((second - first).mean()),
        "difference_ci": interval(drawn.sums(second - first) / num),
    }


def verdict(paired: dict[str, Any], metric: str) -> str:
    """Whether b is `better` or `worse` by the whole interval of a metric's difference, `undecided`, or `unknown` without interval.

    BadInput where nothing was compared.
    """
    task, _, name = metric.rpartition(".")
    found = paired["tasks"][task] if task else paired
    if not found["examples" if task else "predictions"]:
        raise BadInput(
            "no prediction to compare: name item files, an earlier --report-from, a later --until, a larger --sample, or "
            "configurations that predict (ranking.scorer)",
            field="events",
        )
    bounds = found[name].get("difference_ci")
    if bounds is None:
        return "unknown"
    low, high = bounds
    if name == "normalized_entropy":
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
