"""The joiner: impressions and feedback in, labelled examples out.

With the default policy every (impression, item, task) label is emitted exactly once, when its task's window closes in log
time. The policies that do not wait (`delayed.py`) emit a positive of its own when it comes, and say at the window's end which
labels became final. Legend: K items of an impression, T tasks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from recsys.capacity import bound_bytes
from recsys.config import TaskConfig
from recsys.errors import BadInput, SnapshotCorrupt
from recsys.events import messages
from recsys.events.open_requests import OpenRequests
from recsys.events.seen_ids import Kind, SeenIds
from recsys.training.delayed import WAITS, helpers
from recsys.training.held import Early, Held
from recsys.training.opened import Emission, Opened, bytes_of, restored
from recsys.training.spill import Spill
from recsys.types import Bool, Feedback, Impression, Record

logger = logging.getLogger("recsys")


class Joiner:
    """Pure: everything is decided by the records and the log times passed in. Not thread-safe."""

    def __init__(
        self, tasks: Sequence[TaskConfig], folder: Path, memory_bytes: int = 0, seen: SeenIds | None = None
    ) -> None:
        """`memory_bytes`: the whole budget, of which open impressions and held feedback have their shares; `seen`: what the process saw, in
        which this one remembers requests."""
        self._tasks, self._names = tuple(tasks), [task.name for task in tasks]
        self._windows_ms = np.array([int(task.window_s * 1000) for task in tasks])
        waits = [int(task.wait_s * 1000) for task in tasks]
        self._regular_ms = np.where([task.labels in WAITS for task in tasks], waits, self._windows_ms)
        """When each task's labels are emitted, counted from the impression."""
        self._ages_ms: list[int] = self._windows_ms.tolist()
        self._ends_ms = sorted({*self._windows_ms.tolist(), *self._regular_ms.tolist()})
        self._due = [np.stack([self._regular_ms == end, self._windows_ms == end])[:, None] for end in self._ends_ms]
        """At each end [2, 1, T]: tasks emitted regularly, tasks that become final."""
        self._all_wait = all(task.labels == "window" for task in tasks)
        self._followed = np.ones(len(self._tasks), np.bool_)
        self._at_once = [task.labels != "window" for task in tasks]
        self._early = np.array([task.labels == "early_positive" for task in tasks])
        self._helpers = helpers(tasks)
        self._types: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            for kind in task.types:
                self._types.setdefault(kind, []).append(index)
        self._open = OpenRequests[Opened](bound_bytes(memory_bytes, "open"))
        self._queues: list[deque[str]] = [deque() for _ in self._ends_ms]
        self._waiting = Held(bound_bytes(memory_bytes, "held"))
        self.early: list[Early] = []
        """Feedback that was read before the last impression."""
        self._positives: list[tuple[str, int, int]] = []
        """(request, item, task) of positives to emit without waiting."""
        self._settled: list[str] = []
        self._never: list[Feedback] = []
        self._seen = seen or SeenIds(memory_bytes)
        self._spill = Spill(folder)
        self.closing = ""
        """The request whose labels are being emitted."""

    def __len__(self) -> int:
        return len(self._open)

    def impression(self, message: Impression, now_ms: int) -> str:
        """Open an impression at log time `now_ms`; returns what became of it: `opened`, `duplicate`, `no_features` or `no_room`.

        Where there is no room it is the new one that is not learned from: those that are open would be closed with labels that are
        not known yet. `early` has the feedback that was read before it.
        """
        self.early = []
        if not self._seen.first(Kind.REQUEST, message.request_id, now_ms):
            return "duplicate"
        self.early = self._waiting.pop(message.request_id)
        num_bytes = bytes_of(message)
        if not message.features or not self._open.has_room(num_bytes):
            self._seen.first(Kind.REQUEST, _unopened(message.request_id), now_ms)
            self._settled += ["not_opened"] * len(self.early)
            return "no_room" if message.features else "no_features"
        names = self._names
        predictions = [item.predictions.get(name, np.nan) for item in message.items for name in names]
        labels, observed = np.zeros((2, len(message.items), len(names)), np.bool_)
        counted, shown = np.zeros((2, len(message.items)), np.bool_)
        shown[:] = message.activation != "deferred"
        opened = Opened(
            time_ms=now_ms,
            items={item.item_id: index for index, item in enumerate(message.items)},
            labels=labels,
            observed=observed,
            counted=counted,
            shown=shown,
            predictions=np.array(predictions, np.float32).reshape(len(message.items), len(names)),
            place=self._spill.append(now_ms, message.features),
            followed=self._followed,
            num_bytes=num_bytes,
        )
        self._open.add(message.request_id, opened)
        for queue in self._queues:
            queue.append(message.request_id)
        self._settled += [self.feedback(feedback, max(at_ms, now_ms)) for at_ms, feedback in self.early]
        return "opened"

    def feedback(self, message: Feedback, now_ms: int) -> str:
        """Label an open impression; returns `joined`, `duplicate`, `too_late`, `early`, `not_opened`, `unknown_item` or `no_request`."""
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
            age_ms = now_ms - impression.time_ms
            if age_ms > self._ages_ms[task]:
                outcome = "too_late"
            elif impression.labels[item, task]:
                outcome = "duplicate"
            else:
                impression.labels[item, task] = True
                if self._at_once[task] and (self._early[task] or age_ms > self._regular_ms[task]):
                    self._positives.append((message.request_id, item, task))
        return outcome

    def _hold(self, message: Feedback, now_ms: int) -> str:
        """Feedback ahead of its impression waits for one window; after the impression closed it is too late."""
        request_id = message.request_id or ""
        if self._seen.knows(Kind.REQUEST, request_id):
            return "not_opened" if self._seen.knows(Kind.REQUEST, _unopened(request_id)) else "too_late"
        self._give_up(self._waiting.add(request_id, now_ms, message), "not_held")
        return "early"

    def _give_up(self, early: Sequence[Early], outcome: str) -> None:
        self._settled += [outcome] * len(early)
        self._never += [feedback for _, feedback in early]

    def due(self, now_ms: int) -> bool:
        """Whether `close` would emit something."""
        return bool(self._positives) or any(
            queue and self._open[queue[0]].time_ms + end < now_ms
            for queue, end in zip(self._queues, self._ends_ms, strict=True)
        )

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was opened ahead of `now_ms` is as of then, so that its windows close in time."""
        self._open.set_back(now_ms)
        self._waiting.set_back(now_ms)
        self._spill.set_back()

    def due_requests(self, now_ms: int) -> list[str]:
        """The requests of which `close` would emit something."""
        ended = (
            r
            for queue, end in zip(self._queues, self._ends_ms, strict=True)
            for r in queue
            if self._ended_by(r, end, now_ms)
        )
        return list(dict.fromkeys([*(request_id for request_id, _, _ in self._positives), *ended]))

    def _ended_by(self, request_id: str, end: int, now_ms: int) -> bool:
        return self._open[request_id].time_ms + end < now_ms

    def drop(self, request_id: str) -> Record | None:
        """Forget an open impression; what is known of it, as a record."""
        impression = self._open.drop(request_id)
        if impression is None:
            return None
        for queue in self._queues[impression.closed :]:
            queue.remove(request_id)
        self._positives = [positive for positive in self._positives if positive[0] != request_id]
        self._spill.release(impression.place)
        value = orjson.dumps({"request_id": request_id, "items": list(impression.items)})
        return _known("impression", request_id, value, impression.time_ms)

    def drop_all(self) -> None:
        """Forget every open impression."""
        for _, impression in self._open.items():
            self._spill.release(impression.place)
        self._open.clear()
        for queue in self._queues:
            queue.clear()
        self._positives = []

    def holds(self, request_id: str) -> bool:
        """Whether feedback waits for this impression."""
        return request_id in self._waiting

    def held_requests(self) -> list[str]:
        """Requests that feedback waits for."""
        return self._waiting.requests()

    def let_go(self, request_id: str) -> list[Record]:
        """Forget the feedback that waits for an impression; it, as records."""
        held = self._waiting.pop(request_id)
        return [_known("feedback", f.user_id, messages.dump_feedback(f), at_ms) for at_ms, f in held]

    def close(self, now_ms: int) -> Iterator[Emission]:
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
                for index, (queue, end) in enumerate(zip(self._queues, self._ends_ms, strict=True))
                if queue and self._open[queue[0]].time_ms + end < now_ms
            ]
            if not due:
                break
            _, index = min(due)
            yield self._close(self._queues[index].popleft(), index)
        self._give_up(self._waiting.expired(now_ms - self._ends_ms[-1]), "no_impression")
        self._spill.drop_closed()

    def _ended(self, request_id: str, task: int) -> bool:
        """Whether the task's regular emission is past: else it carries this positive, too."""
        return self._ends_ms.index(self._regular_ms[task]) < self._open[request_id].closed

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
        if impression.closed == len(self._ends_ms):
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
        total = np.zeros(len(self._tasks), np.int64)
        for request_id in self._open if request_ids is None else request_ids:
            if (entry := self._open.get(request_id)) is None:
                continue
            left = entry.followed.copy()
            for _, final in self._due[: entry.closed]:
                left &= ~final[0]
            total += left * (len(entry.items) - (entry.observed & self._early).sum(0))
        return dict(zip((task.name for task in self._tasks), total.tolist(), strict=True))

    def convert(self, features: Callable[[bytes], bytes]) -> None:
        """Write the features of every open impression anew, behind what the files hold; one that cannot be read is left as it is."""
        for _, entry in self._open.items():
            with contextlib.suppress(SnapshotCorrupt, BadInput):  # its emission says so
                data = features(self._spill.read(entry.place))
                self._spill.release(entry.place)
                entry.place = self._spill.append(entry.time_ms, data)

    @property
    def num_held(self) -> int:
        """Feedback that waits for its impression."""
        return len(self._waiting)

    def take_settled(self) -> list[str]:
        """What became of feedback that came ahead of its impression, since the last call: as of `feedback`, or `no_impression`."""
        settled, self._settled = self._settled, []
        return settled

    def take_never(self) -> list[Feedback]:
        """Feedback, since the last call, that waited for its impression in vain."""
        never, self._never = self._never, []
        return never

    @property
    def full_ratios(self) -> tuple[float, float]:
        """How full the room for open impressions is, and that for feedback ahead of its impression."""
        return self._open.full_ratio, self._waiting.full_ratio

    def sweep_spill(self, kept: Collection[str]) -> None:
        """Delete spilled features of minutes that no checkpoint needs (`kept`), nor any open impression."""
        self._spill.sweep(kept)

    def close_files(self) -> None:
        """Close the files of open impressions; nothing is called after it."""
        self._spill.close()

    def state(self) -> dict[str, Any]:
        """Everything but the spilled features, as JSON-able values; the spill's sizes tell how much of its files belongs."""
        return {
            "ends": self._ends_ms,
            "open": [opened.state(request_id) for request_id, opened in self._open.items()],
            "early": self._waiting.state(),
            "requests": {name: array.tolist() for name, array in self._seen.state(Kind.REQUEST).items()},
            "spill": self._spill.sizes(),
            "spill_begun": self._spill.begun,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load `state`, and cut the spill files back to what they held then."""
        ends_ms, over = state.get("ends", self._ends_ms), 0
        for saved in state["open"]:
            request_id, opened = restored(saved, len(self._tasks))
            passed_ms = ends_ms[opened.closed - 1] if opened.closed else -1
            opened.closed = sum(end <= passed_ms for end in self._ends_ms)  # the tasks' windows may be others now
            if opened.closed == len(self._ends_ms):
                over += 1
                continue
            self._open.add(request_id, opened)
            for queue in self._queues[opened.closed :]:
                queue.append(request_id)
        self._waiting.restore(state["early"])
        requests = {name: np.array(values, np.int64) for name, values in state["requests"].items()}
        self._seen.restore(Kind.REQUEST, requests)
        places = [entry.place for _, entry in self._open.items()]
        self._spill.restore(state["spill"], places, state.get("spill_begun"))  # an earlier release did not keep it
        if over:
            logger.warning(
                "%d open impressions are over by the shorter windows of today: their last labels are not learned", over
            )


def _known(topic: str, key: str, value: bytes, time_ms: int) -> Record:
    """What is still known of a record whose place in the log is not."""
    return Record(topic=topic, partition=0, offset=-1, key=key, value=value, time_ms=time_ms)


def _unopened(request_id: str) -> str:
    """By what an impression is remembered that was not opened: no id has a control character."""
    return request_id + "\n"
