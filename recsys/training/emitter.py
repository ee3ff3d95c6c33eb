"""Emitting labels of open impressions: each task's regularly, at its window's end or before, and what is final then.

With the default policy every (impression, item, task) label is emitted exactly once, when its task's window closes in log
time. The policies that do not wait (`delayed.py`) emit a positive of its own when it comes, and say at the window's end which
labels became final. Legend: K items of an impression, T tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from recsys.config import TaskConfig
from recsys.events.open_requests import OpenRequests
from recsys.training.delayed import WAITS, helpers
from recsys.training.opened import Emission, Opened
from recsys.training.spill import Spill
from recsys.types import Bool


class Emitter:
    """Which open impressions come to an end when, and what is emitted of them; those that came to their last end are closed. Pure, as the
    joiner, which opens and labels them."""

    def __init__(self, tasks: Sequence[TaskConfig], opened: OpenRequests[Opened], spill: Spill) -> None:
        self._names, self._open, self._spill = [task.name for task in tasks], opened, spill
        windows_ms = np.array([int(task.window_s * 1000) for task in tasks])
        waits = [int(task.wait_s * 1000) for task in tasks]
        self._regular_ms = np.where([task.labels in WAITS for task in tasks], waits, windows_ms)
        """When each task's labels are emitted, counted from the impression."""
        self.ages_ms: list[int] = windows_ms.tolist()
        """How old an impression may be when feedback labels it, by task."""
        self.ends_ms = sorted({*windows_ms.tolist(), *self._regular_ms.tolist()})
        self._due = [np.stack([self._regular_ms == end, windows_ms == end])[:, None] for end in self.ends_ms]
        """At each end [2, 1, T]: tasks emitted regularly, tasks that become final."""
        self._all_wait = all(task.labels == "window" for task in tasks)
        self.at_once = [task.labels != "window" for task in tasks]
        """Which tasks may emit positives without waiting."""
        self._early = np.array([task.labels == "early_positive" for task in tasks])
        self._helpers = helpers(tasks)
        self._queues: list[deque[str]] = [deque() for _ in self.ends_ms]
        self._positives: list[tuple[str, int, int]] = []
        """(request, item, task) of positives to emit without waiting."""
        self.closing = ""
        """The request whose labels are being emitted."""

    def add(self, request_id: str, closed: int = 0) -> None:
        """An impression was opened, of which so many ends have passed."""
        for queue in self._queues[closed:]:
            queue.append(request_id)

    def positive(self, request_id: str, item: int, task: int, age_ms: int) -> None:
        """An impression of that age got a positive label of a task `at_once`: it is emitted without waiting if its policy says so."""
        if self._early[task] or age_ms > self._regular_ms[task]:
            self._positives.append((request_id, item, task))

    def drop(self, request_id: str, closed: int) -> None:
        """Forget an impression of which so many ends have passed."""
        for queue in self._queues[closed:]:
            queue.remove(request_id)
        self._positives = [positive for positive in self._positives if positive[0] != request_id]

    def clear(self) -> None:
        """Forget all."""
        for queue in self._queues:
            queue.clear()
        self._positives = []

    def due(self, now_ms: int) -> bool:
        """Whether `emissions` would give something."""
        return bool(self._positives) or any(
            queue and self._open[queue[0]].time_ms + end < now_ms
            for queue, end in zip(self._queues, self.ends_ms, strict=True)
        )

    def due_requests(self, now_ms: int) -> list[str]:
        """The requests of which `emissions` would give something."""
        found = [request_id for request_id, _, _ in self._positives]
        for queue, end in zip(self._queues, self.ends_ms, strict=True):
            found += [request_id for request_id in queue if self._open[request_id].time_ms + end < now_ms]
        return list(dict.fromkeys(found))

    def emissions(self, now_ms: int) -> Iterator[Emission]:
        """Emit positives that need not wait, in order of arrival; then what ended before `now_ms`, in order of its end, then of
        opening."""
        self.closing = ""
        positives, self._positives = self._positives, []
        for request_id, item, task in positives:
            if self._early[task] or self._ended(request_id, task):
                yield self._positive(request_id, item, task)
        while True:
            due = [
                (self._open[queue[0]].time_ms + end, index)
                for index, (queue, end) in enumerate(zip(self._queues, self.ends_ms, strict=True))
                if queue and self._open[queue[0]].time_ms + end < now_ms
            ]
            if not due:
                break
            _, index = min(due)
            yield self._close(self._queues[index].popleft(), index)

    def _ended(self, request_id: str, task: int) -> bool:
        """Whether the task's regular emission is past: else it carries this positive, too."""
        return self.ends_ms.index(self._regular_ms[task]) < self._open[request_id].closed

    def _positive(self, request_id: str, item: int, task: int) -> Emission:
        self.closing = request_id
        mask = np.zeros_like(self._open[request_id].labels)
        mask[item, task] = True
        if self._early[task]:
            self._open[request_id].observed[item, task] = True
        return self._emission(request_id, mask, mask if self._early[task] else np.zeros_like(mask))

    def _close(self, request_id: str, index: int) -> Emission:
        self.closing = request_id
        impression = self._open[request_id]
        regular, final = every = np.empty((2, *impression.labels.shape), np.bool_)
        every[:] = self._due[index]
        close = self._emission if self._all_wait else self._close_some
        emission = close(request_id, regular, final)
        impression.closed += 1
        if impression.closed == len(self.ends_ms):
            self._open.drop(request_id)
            self._spill.release(impression.place)
        return emission

    def _close_some(self, request_id: str, regular: Bool, final: Bool) -> Emission:
        """The same where tasks did not wait: [K, T] without what was emitted before, and what helpers learn."""
        impression = self._open[request_id]
        early = impression.observed & self._early
        mask = regular & ~early
        for task, late, never in self._helpers:
            # What a helper learns is known at the window's end: was there a positive, and had it been seen at the wait's.
            impression.labels[:, late] = impression.labels[:, task] & ~impression.observed[:, task]
            impression.labels[:, never] = ~impression.labels[:, task]
            mask[:, never] &= ~impression.observed[:, task]
        emission = self._emission(request_id, mask, final & ~early)
        np.copyto(impression.observed, impression.labels, where=regular & ~self._early)
        return emission

    def _emission(self, request_id: str, mask: Bool, final: Bool) -> Emission:
        impression = self._open[request_id]
        mask, final = mask & impression.followed, final & impression.followed
        trained = np.logical_or.reduce(mask, 1) & impression.shown
        emission = Emission(
            request_id=request_id,
            time_ms=impression.time_ms,
            features=self._spill.read(impression.place),
            labels=impression.labels.copy(),
            mask=mask,
            final=final,
            shown=impression.shown.copy(),
            predictions=impression.predictions,
            first=trained & ~impression.counted,
        )
        impression.counted |= trained
        return emission

    def waiting(self, request_ids: Iterable[str] | None = None) -> dict[str, int]:
        """Labels by task that are not final yet: of all open impressions, or of these requests."""
        total = np.zeros(len(self._names), np.int64)
        for request_id in self._open if request_ids is None else request_ids:
            if (entry := self._open.get(request_id)) is None:
                continue
            left = entry.followed.copy()
            for _, final in self._due[: entry.closed]:
                left &= ~final[0]
            total += left * (len(entry.items) - (entry.observed & self._early).sum(0))
        return dict(zip(self._names, total.tolist(), strict=True))
