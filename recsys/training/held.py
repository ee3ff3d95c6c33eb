"""Feedback that was read ahead of its impression, held once for all who wait for it, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from recsys.events import messages
from recsys.types import Feedback, Record

_FIELDS = ("event_id", "user_id", "item_id", "type", "time_ms", "session_id", "request_id", "value")
"""What is held of it: all but the context, which is the request's."""
ENTRY_BYTES = 700
"""Of one feedback beside its texts, when each names a request of its own."""

Early = tuple[int, Feedback]
"""Log time and feedback."""


class Held:
    """Early feedback by request, the request that began to wait first in front, and what became of it. Beyond `limit_bytes` that one is
    given up: honest feedback waits for milliseconds, so that who invents requests pushes out what they sent before. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._requests: OrderedDict[str, list[Early]] = OrderedDict()
        self._bytes = 0
        self._settled: list[str] = []
        self._never: list[Feedback] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        """Feedback that waits."""
        return sum(map(len, self._requests.values()))

    def requests(self) -> list[str]:
        """Those that something waits for."""
        return list(self._requests)

    @property
    def full_ratio(self) -> float:
        """How full it is; at 1 the oldest is given up."""
        return self._bytes / self._limit

    def add(self, request_id: str, at_ms: int, feedback: Feedback) -> None:
        """Hold one more; what is given up for it was `not_held`."""
        early = at_ms, replace(feedback, context=None)
        self._requests.setdefault(request_id, []).append(early)
        self._bytes += _bytes_of(early)
        gone: list[Early] = []
        while self._bytes > self._limit and len(self._requests) > 1:
            gone += self.pop(next(iter(self._requests)))
        if self._bytes > self._limit:  # all of it waits for one request: the newest is not held
            gone.append(self._requests[request_id].pop())
            self._bytes -= _bytes_of(early)
            if not self._requests[request_id]:
                del self._requests[request_id]
        self._give_up(gone, "not_held")

    def pop(self, request_id: str) -> list[Early]:
        """What waits for a request, which came or is given up."""
        early = self._requests.pop(request_id, [])
        self._bytes -= sum(map(_bytes_of, early))
        return early

    def let_go(self, request_id: str) -> list[Record]:
        """Forget what waits for a request; it, as records whose places in the log are not known any more."""
        return [
            Record(
                topic="feedback",
                partition=0,
                offset=-1,
                key=feedback.user_id,
                value=messages.dump_feedback(feedback),
                time_ms=at_ms,
            )
            for at_ms, feedback in self.pop(request_id)
        ]

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what came ahead of `now_ms` came then."""
        for request_id, early in self._requests.items():
            self._requests[request_id] = [(min(at_ms, now_ms), feedback) for at_ms, feedback in early]

    def expire(self, before_ms: int) -> None:
        """Give up what waits for requests that something waited for already before `before_ms`: there was `no_impression`."""
        while self._requests and next(iter(self._requests.values()))[0][0] < before_ms:
            self._give_up(self.pop(next(iter(self._requests))), "no_impression")

    def _give_up(self, gone: Sequence[Early], outcome: str) -> None:
        self.settle([outcome] * len(gone))
        self._never += [feedback for _, feedback in gone]

    def settle(self, outcomes: Sequence[str]) -> None:
        """This became of feedback that is held no more."""
        self._settled += outcomes

    def take_settled(self) -> list[str]:
        """What became of feedback that came ahead of its impression, since the last call: as of `Joiner.feedback`, `not_held` or
        `no_impression`."""
        settled, self._settled = self._settled, []
        return settled

    def take_never(self) -> list[Feedback]:
        """Feedback, since the last call, that waited for its impression in vain."""
        never, self._never = self._never, []
        return never

    def state(self) -> list[Any]:
        """Everything, as JSON-able values."""
        return [
            [r, [(at, *(getattr(f, name) for name in _FIELDS)) for at, f in early]]
            for r, early in self._requests.items()
        ]

    def restore(self, state: Iterable[Any]) -> None:
        """Load what `state` returned, or what releases wrote that held (log time, fields by name)."""
        for request_id, early in state:
            for at_ms, *fields in early:
                values = fields[0] if isinstance(fields[0], dict) else dict(zip(_FIELDS, fields, strict=True))
                self.add(request_id, at_ms, Feedback(**values))


def _bytes_of(early: Early) -> int:
    feedback = early[1]
    texts = (
        feedback.event_id,
        feedback.user_id,
        feedback.item_id,
        feedback.request_id or "",
        feedback.session_id or "",
    )
    return ENTRY_BYTES + sum(map(len, texts))
