"""The joiner: impressions and feedback in, labelled examples out; when which labels are emitted is the emitter's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from recsys.capacity import bound_bytes
from recsys.config import TaskConfig
from recsys.errors import BadInput, SnapshotCorrupt
from recsys.events.open_requests import OpenRequests
from recsys.events.seen_ids import Kind, SeenIds
from recsys.training.emitter import Emitter
from recsys.training.held import Early, Held
from recsys.training.opened import Emission, Opened, bytes_of, restored
from recsys.training.spill import Spill
from recsys.types import Feedback, Impression, Record

logger = logging.getLogger("recsys")


class Joiner:
    """Pure: everything is decided by the records and the log times passed in. Not thread-safe."""

    def __init__(
        self, tasks: Sequence[TaskConfig], folder: Path, memory_bytes: int = 0, seen: SeenIds | None = None
    ) -> None:
        """`memory_bytes`: the whole budget, of which open impressions and held feedback have their shares; `seen`: what the process saw, in
        which this one remembers requests."""
        self._tasks, self._names = tuple(tasks), [task.name for task in tasks]
        self._followed = np.ones(len(self._tasks), np.bool_)
        self._types: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            for kind in task.types:
                self._types.setdefault(kind, []).append(index)
        self._open = OpenRequests[Opened](bound_bytes(memory_bytes, "open"))
        self.spill = Spill(folder)
        self.emitter = Emitter(tasks, self._open, self.spill)
        self._ages_ms, self._at_once = self.emitter.ages_ms, self.emitter.at_once
        self.held = Held(bound_bytes(memory_bytes, "held"))
        self.early: list[Early] = []
        """Feedback that was read before the last impression."""
        self._seen = seen or SeenIds(memory_bytes)

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
        self.early = self.held.pop(message.request_id)
        num_bytes = bytes_of(message)
        if not message.features or not self._open.has_room(num_bytes):
            self._seen.first(Kind.REQUEST, _unopened(message.request_id), now_ms)
            self.held.settle(["not_opened"] * len(self.early))
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
            place=self.spill.append(now_ms, message.features),
            followed=self._followed,
            num_bytes=num_bytes,
        )
        self._open.add(message.request_id, opened)
        self.emitter.add(message.request_id)
        if self.early:
            self.held.settle([self.feedback(feedback, max(at_ms, now_ms)) for at_ms, feedback in self.early])
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
                if self._at_once[task]:
                    self.emitter.positive(message.request_id, item, task, age_ms)
        return outcome

    def _hold(self, message: Feedback, now_ms: int) -> str:
        """Feedback ahead of its impression waits for one window; after the impression closed it is too late."""
        request_id = message.request_id or ""
        if self._seen.knows(Kind.REQUEST, request_id):
            return "not_opened" if self._seen.knows(Kind.REQUEST, _unopened(request_id)) else "too_late"
        self.held.add(request_id, now_ms, message)
        return "early"

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was opened ahead of `now_ms` is as of then, so that its windows close in time."""
        self._open.set_back(now_ms)
        self.held.set_back(now_ms)
        self.spill.set_back()

    def drop(self, request_id: str) -> Record | None:
        """Forget an open impression; what is known of it, as a record whose place in the log is not known any more."""
        impression = self._open.drop(request_id)
        if impression is None:
            return None
        self.emitter.drop(request_id, impression.closed)
        self.spill.release(impression.place)
        value = orjson.dumps({"request_id": request_id, "items": list(impression.items)})
        return Record(
            topic="impression", partition=0, offset=-1, key=request_id, value=value, time_ms=impression.time_ms
        )

    def drop_all(self) -> None:
        """Forget every open impression."""
        for _, impression in self._open.items():
            self.spill.release(impression.place)
        self._open.clear()
        self.emitter.clear()

    def close(self, now_ms: int) -> Iterator[Emission]:
        """Emit what is due; then give up what waits in vain."""
        yield from self.emitter.emissions(now_ms)
        self.held.expire(now_ms - self.emitter.ends_ms[-1])
        self.spill.drop_closed()

    def convert(self, features: Callable[[bytes], bytes]) -> None:
        """Write the features of every open impression anew, behind what the files hold; one that cannot be read is left as it is."""
        for _, entry in self._open.items():
            with contextlib.suppress(SnapshotCorrupt, BadInput):  # its emission says so
                data = features(self.spill.read(entry.place))
                self.spill.release(entry.place)
                entry.place = self.spill.append(entry.time_ms, data)

    @property
    def full_ratios(self) -> tuple[float, float]:
        """How full the room for open impressions is, and that for feedback ahead of its impression."""
        return self._open.full_ratio, self.held.full_ratio

    def state(self) -> dict[str, Any]:
        """Everything but the spilled features, as JSON-able values; the spill's sizes tell how much of its files belongs."""
        return {
            "ends": self.emitter.ends_ms,
            "open": [opened.state(request_id) for request_id, opened in self._open.items()],
            "early": self.held.state(),
            "requests": {name: array.tolist() for name, array in self._seen.state(Kind.REQUEST).items()},
            "spill": self.spill.sizes(),
            "spill_begun": self.spill.begun,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load `state`, and cut the spill files back to what they held then."""
        windows_ms = self.emitter.ends_ms
        ends_ms, over = state.get("ends", windows_ms), 0
        for saved in state["open"]:
            request_id, opened = restored(saved, len(self._tasks))
            passed_ms = ends_ms[opened.closed - 1] if opened.closed else -1
            opened.closed = sum(end <= passed_ms for end in windows_ms)  # the tasks' windows may be others now
            if opened.closed == len(windows_ms):
                over += 1
                continue
            self._open.add(request_id, opened)
            self.emitter.add(request_id, opened.closed)
        self.held.restore(state["early"])
        requests = {name: np.array(values, np.int64) for name, values in state["requests"].items()}
        self._seen.restore(Kind.REQUEST, requests)
        places = [entry.place for _, entry in self._open.items()]
        self.spill.restore(state["spill"], places, state.get("spill_begun"))  # an earlier release did not keep it
        if over:
            logger.warning(
                "%d open impressions are over by the shorter windows of today: their last labels are not learned", over
            )


def _unopened(request_id: str) -> str:
    """By what an impression is remembered that was not opened: no id has a control character."""
    return request_id + "\n"
