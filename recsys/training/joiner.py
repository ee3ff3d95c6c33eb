"""The joiner: impressions and feedback in, labelled examples out.

Every (impression, item, task) label is emitted exactly once, when its task's window closes in log time. Emissions of one
impression have disjoint task masks. Tasks of one window close together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recsys.config import TaskConfig
from recsys.events.recent import Recent
from recsys.training.spill import Place, Spill
from recsys.types import Bool, Feedback, Float32, Impression


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """Labels that became final together: K items of one impression, T tasks."""

    request_id: str
    time_ms: int
    features: bytes
    labels: Bool
    """[K, T]"""
    mask: Bool
    """[T] tasks that are final now."""
    shown: Bool
    """[K] items that count as shown."""
    predictions: Float32
    """[K, T] as served; NaN where none was logged."""
    first: bool
    """The impression's first emission: only it counts for admission, frequencies and batch statistics."""


@dataclass(slots=True)
class _Open:
    time_ms: int
    items: dict[str, int]
    labels: Bool
    shown: Bool
    predictions: Float32
    place: Place
    emitted: int = 0


class Joiner:
    """Pure: everything is decided by the records and the log times passed in. Not thread-safe."""

    def __init__(self, tasks: Sequence[TaskConfig], folder: Path) -> None:
        self._tasks = tuple(tasks)
        windows = sorted({int(task.window_s * 1000) for task in tasks})
        self._windows_ms = windows
        self._masks = [np.array([int(task.window_s * 1000) == w for task in tasks]) for w in windows]
        self._types: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            for kind in task.types:
                self._types.setdefault(kind, []).append(index)
        self._open: dict[str, _Open] = {}
        self._queues: list[deque[str]] = [deque() for _ in windows]
        self._early: OrderedDict[str, tuple[int, list[Feedback]]] = OrderedDict()
        self._settled: list[str] = []
        self._requests = Recent()
        self._spill = Spill(folder)

    def __len__(self) -> int:
        return len(self._open)

    def impression(self, message: Impression, now_ms: int) -> str:
        """Open an impression at log time `now_ms`; returns what became of it: `opened`, `duplicate` or `no_features`."""
        if not message.features:
            return "no_features"
        if not self._requests.add(message.request_id, now_ms):
            return "duplicate"
        names = [task.name for task in self._tasks]
        predictions = [[item.predictions.get(name, np.nan) for name in names] for item in message.items]
        self._open[message.request_id] = _Open(
            time_ms=now_ms,
            items={item.item_id: index for index, item in enumerate(message.items)},
            labels=np.zeros((len(message.items), len(names)), np.bool_),
            shown=np.full(len(message.items), message.activation != "deferred"),
            predictions=np.array(predictions, np.float32),
            place=self._spill.append(now_ms, message.features),
        )
        for queue in self._queues:
            queue.append(message.request_id)
        _, early = self._early.pop(message.request_id, (0, []))
        self._settled += [self.feedback(feedback, now_ms) for feedback in early]
        return "opened"

    def feedback(self, message: Feedback, now_ms: int) -> str:
        """Label an open impression; returns `joined`, `duplicate`, `too_late`, `early`, `unknown_item` or `no_request`."""
        if message.request_id is None:
            return "no_request"
        impression = self._open.get(message.request_id)
        if impression is None:
            return self._hold(message, now_ms)
        item = impression.items.get(message.item_id)
        if item is None:
            return "unknown_item"
        outcome = "joined"
        if message.type == "view":
            impression.shown[item] = True
        for task in self._types.get(message.type, ()):
            threshold = self._tasks[task].min_value
            if threshold is not None and (message.value is None or message.value < threshold):
                continue
            if now_ms > impression.time_ms + int(self._tasks[task].window_s * 1000):
                outcome = "too_late"
            elif impression.labels[item, task]:
                outcome = "duplicate"
            else:
                impression.labels[item, task] = True
        return outcome

    def _hold(self, message: Feedback, now_ms: int) -> str:
        """Feedback ahead of its impression waits for one window; after the impression closed it is too late."""
        request_id = message.request_id or ""
        if self._requests.contains(request_id):
            return "too_late"
        self._early.setdefault(request_id, (now_ms, []))[1].append(message)
        return "early"

    def due(self, now_ms: int) -> bool:
        """Whether `close` would emit something."""
        return any(
            queue and self._open[queue[0]].time_ms + window < now_ms
            for queue, window in zip(self._queues, self._windows_ms, strict=True)
        )

    def close(self, now_ms: int) -> Iterator[Emission]:
        """Emit every label whose window ended before `now_ms`, in order of closing time, then of opening."""
        while True:
            due = [
                (self._open[queue[0]].time_ms + window, index)
                for index, (queue, window) in enumerate(zip(self._queues, self._windows_ms, strict=True))
                if queue and self._open[queue[0]].time_ms + window < now_ms
            ]
            if not due:
                break
            _, index = min(due)
            yield self._emit(self._queues[index].popleft(), index)
        waited = self._windows_ms[-1]
        while self._early and next(iter(self._early.values()))[0] + waited < now_ms:
            _, (_, never) = self._early.popitem(last=False)
            self._settled += ["no_impression"] * len(never)
        self._spill.drop_closed()

    def _emit(self, request_id: str, window: int) -> Emission:
        impression = self._open[request_id]
        emission = Emission(
            request_id=request_id,
            time_ms=impression.time_ms,
            features=self._spill.read(impression.place),
            labels=impression.labels.copy(),
            mask=self._masks[window],
            shown=impression.shown.copy(),
            predictions=impression.predictions,
            first=impression.emitted == 0,
        )
        impression.emitted += 1
        if impression.emitted == len(self._windows_ms):
            del self._open[request_id]
            self._spill.release(impression.place)
        return emission

    def take_settled(self) -> list[str]:
        """What became of feedback that came ahead of its impression, since the last call: as of `feedback`, or `no_impression`."""
        settled, self._settled = self._settled, []
        return settled

    def take_dropped(self) -> list[Path]:
        """Spill files to delete once a checkpoint is committed."""
        return self._spill.take_dropped()

    def state(self) -> dict[str, Any]:
        """Everything but the spilled features, as JSON-able values; the spill's sizes tell how much of its files belongs."""
        return {
            "open": [
                [
                    request_id,
                    entry.time_ms,
                    list(entry.items),
                    np.packbits(entry.labels).tolist(),
                    np.packbits(entry.shown).tolist(),
                    entry.predictions.astype(np.float64).ravel().tolist(),
                    list(entry.place),
                    entry.emitted,
                ]
                for request_id, entry in self._open.items()
            ],
            "early": [[r, t, [_feedback_state(f) for f in messages]] for r, (t, messages) in self._early.items()],
            "requests": {name: array.tolist() for name, array in self._requests.state().items()},
            "spill": self._spill.sizes(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load `state`, and cut the spill files back to what they held then."""
        tasks = len(self._tasks)
        for request_id, time_ms, items, labels, shown, predictions, place, emitted in state["open"]:
            size = len(items)
            bits = np.unpackbits(np.array(labels, np.uint8), count=size * tasks).astype(np.bool_)
            self._open[request_id] = _Open(
                time_ms=time_ms,
                items={item: index for index, item in enumerate(items)},
                labels=bits.reshape(size, tasks),
                shown=np.unpackbits(np.array(shown, np.uint8), count=size).astype(np.bool_),
                predictions=np.array([np.nan if p is None else p for p in predictions], np.float32).reshape(
                    size, tasks
                ),
                place=Place(*place),
                emitted=emitted,
            )
            for queue in self._queues[emitted:]:
                queue.append(request_id)
        self._early = OrderedDict((r, (t, [Feedback(**f) for f in messages])) for r, t, messages in state["early"])
        self._requests.restore({name: np.array(values, np.int64) for name, values in state["requests"].items()})
        self._spill.restore(state["spill"], [entry.place for entry in self._open.values()])


def _feedback_state(feedback: Feedback) -> dict[str, Any]:
    return {name: getattr(feedback, name) for name in Feedback.__dataclass_fields__ if name != "context"}
