"""Feedback as it comes in: judged once, appended, and told truthfully what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from recsys import metrics
from recsys.candidates.sources import Sources
from recsys.clock import MAX_LEAD_MS, Clock
from recsys.config import Config
from recsys.errors import LogUnavailable
from recsys.events import messages
from recsys.events.recent import digest_of
from recsys.events.seen_ids import Kind
from recsys.streams.base import EventLog
from recsys.types import Feedback
from services.common.process import logger
from services.ranking.parse import Refused

NOTES = {
    "too_late": "what happened before the horizon enters the history only",
    "unknown_type": "no section of the configuration names this type: nothing uses it",
    "no_request": "only labels and rewards use this type, and they need the request_id of the answer: nothing uses it",
    "unknown_item": "the item is not in the catalogue: it is not counted before it is",
    "unknown_request": "no impression of this request came within the horizon: it makes no label or reward until one comes",
    "clamped_time": "time_ms lies ahead of the clock: the time of arrival is taken",
}
"""What an outcome's `note` may be, and what it means. An event of several carries them with commas between."""
_COPY_S = 10.0
"""A copy waits this long for what becomes of the first one, which is being appended: longer than any append takes that ends well."""
_SAY_EVERY_MS = 60_000
_MOST_SAID = 1000


class Intake:
    """Takes feedback of all requests of one process. Thread-safe."""

    def __init__(
        self, config: Config, log: EventLog, clock: Clock, sources: Sources, knows_all: Callable[[], bool]
    ) -> None:
        """`knows_all`: whether catalogue and impressions are read, so that what is missing there is unknown."""
        self._log, self._clock, self._sources, self._knows_all = log, clock, sources, knows_all
        self._used_alone, self._used_joined = config.types_alone, config.types_joined
        self._seen = sources.events.seen
        self._on_the_way: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str], int] = {}

    def answered(self, request_id: str) -> None:
        """An answer was logged: its impression comes back by the log a moment later, perhaps after its first click."""
        with self._lock:
            self._seen.first(Kind.ANSWERED, request_id, self._clock.now_ms())

    def put(self, item_ids: Iterable[str]) -> None:
        """Items were accepted: they are in the catalogue a moment later."""
        now_ms = self._clock.now_ms()
        with self._lock:
            for item_id in item_ids:
                self._seen.first(Kind.PUT, item_id, now_ms)

    def take(self, feedback: Sequence[Feedback | Refused]) -> list[dict[str, str]]:
        """Append what is good and new; one outcome an event, in order.

        Raises LogError when it could not be appended, or when another request's append of a copy could not: send all again.
        """
        now_ms, appended = self._clock.now_ms(), Future[None]()
        outcomes: list[dict[str, str]] = []
        fresh: list[tuple[Feedback, int, bool]] = []
        copies: set[Future[None]] = set()
        # Judged and reserved in one: a copy in another request sees the reservation.
        with self._lock, self._sources.catalogue.reading():
            for event in feedback:
                if isinstance(event, Refused):
                    outcomes.append({"event_id": event.id, "status": "rejected", "reason": event.reason})
                    continue
                outcome, digest = {"event_id": event.event_id, "status": "duplicate"}, digest_of(event.event_id)
                outcomes.append(outcome)
                if (other := self._on_the_way.get(event.event_id)) is not None:
                    copies.add(other)
                elif not self._known(digest):
                    outcome |= self._accepted_with(notes := self.notes(event, now_ms))
                    fresh.append((event, digest, "too_late" in notes))
                    self._on_the_way[event.event_id] = appended
        if fresh:
            self._append(fresh, appended, now_ms)
        _wait(copies - {appended})
        for outcome in outcomes:
            metrics.FEEDBACK.labels(outcome["status"]).inc()
            _count(outcome["note"].split(",") if "note" in outcome else ())
        return outcomes

    def heard(self, event: Feedback, digest: int, now_ms: int) -> None:
        """Feedback was read from the log: if it came in by another way than `take`, its notes are counted and said here."""
        if event.event_id not in self._on_the_way and not self._mine(digest):
            _count(self.notes(event, now_ms))

    def _mine(self, digest: int) -> bool:
        """Whether it was accepted here."""
        return self._seen.knows(Kind.ACCEPTED, digest) or self._seen.knows(Kind.LATE, digest)

    def _known(self, digest: int) -> bool:
        """Whether a copy was accepted here, or read from the log wherever it came from."""
        return self._mine(digest) or self._seen.knows(Kind.EVENT, digest)

    def _append(self, fresh: Sequence[tuple[Feedback, int, bool]], appended: Future[None], now_ms: int) -> None:
        try:
            self._log.append("feedback", [(event.user_id, messages.dump_feedback(event)) for event, _, _ in fresh])
        except BaseException as error:
            with self._lock:
                for event, _, _ in fresh:
                    del self._on_the_way[event.event_id]
            appended.set_exception(error)
            raise
        with self._lock:
            for event, digest, late in fresh:
                self._seen.first(Kind.LATE if late else Kind.ACCEPTED, digest, now_ms)
                del self._on_the_way[event.event_id]  # last: it is always known by one of the two
        appended.set_result(None)

    def _accepted_with(self, notes: Sequence[str]) -> dict[str, str]:
        return {"status": "accepted", "note": ",".join(notes)} if notes else {"status": "accepted"}

    def notes(self, event: Feedback, now_ms: int) -> list[str]:
        """Names of `NOTES` that are true of an event."""
        if self._seen.too_late(Kind.EVENT, event.time_ms, now_ms):
            found = ["too_late"]
        elif event.type not in self._used_alone and event.type not in self._used_joined:
            found = ["unknown_type"]
        else:
            found = self._unknown(event) if self._knows_all() else []
            if event.type not in self._used_alone and event.request_id is None:
                found.append("no_request")
            if event.time_ms > now_ms + MAX_LEAD_MS:
                found.append("clamped_time")
        for note in found:
            self._say(note, event, now_ms)
        return found

    def _unknown(self, event: Feedback) -> list[str]:
        found, catalogue = [], self._sources.catalogue
        row = catalogue.row(event.item_id)
        if (row is None or not catalogue.alive[row]) and not self._seen.knows(Kind.PUT, event.item_id):
            found.append("unknown_item")
        if event.request_id is not None:
            request = digest_of(event.request_id)
            if not (self._seen.knows(Kind.ANSWERED, request) or self._seen.knows(Kind.REQUEST, request)):
                found.append("unknown_request")
        return found

    def _say(self, note: str, event: Feedback, now_ms: int) -> None:
        """One line a minute for each note and type: a producer that is wrong is wrong with every event."""
        what = note, event.type
        last_ms = self._said.get(what)
        if last_ms is not None and now_ms < last_ms + _SAY_EVERY_MS:
            return
        if last_ms is None and len(self._said) >= _MOST_SAID:  # types are whatever strangers send
            return
        self._said[what] = now_ms
        logger.warning(
            "feedback of type %s (event_id %s, item_id %s): %s: %s",
            *(messages.shorten(value) for value in (event.type, event.event_id, event.item_id)),
            note,
            NOTES[note],
        )


def _count(notes: Iterable[str]) -> None:
    for note in notes:
        metrics.FEEDBACK_NOTES.labels(note).inc()


def _wait(copies: Iterable[Future[None]]) -> None:
    """Until the first copies are in the log: before, nobody may be told that they are."""
    for first in copies:
        try:
            first.result(_COPY_S)
        except FutureTimeout:
            raise LogUnavailable(
                f"a copy of one of these events is being appended for {_COPY_S:g} s already: send them again later"
            ) from None
