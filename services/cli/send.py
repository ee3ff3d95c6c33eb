"""`recsys send`: event files, played in real time against running services."""

from __future__ import annotations

import argparse
import contextlib
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recsys import config
from recsys.clock import Clock, SystemClock
from recsys.errors import BadInput, RecsysError
from recsys.events import event_files, messages
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.types import Feedback
from services.cli.client import Client, Refused, url_of
from services.cli.main import DONE, MISSED, emit
from services.common.process import Stop

N = 20
"""Items asked for."""
WORKERS = 16
"""Requests under way at once: 16 of 20 ms each are 800 a second, more than one process answers."""
BACKLOG = 512
"""Events that wait for one worker before the schedule waits, too: a stuck service must not fill the memory."""
BATCH = 1000
"""Most items, or feedback that is late together, in one call."""
REASONS = 5
"""Different reasons of refusal that the result names."""
LISTS = 2000
"""Users of each worker whose last list is remembered, for what follows a click (a like, a long view)."""

Post = Callable[[Sequence[Feedback]], Sequence[dict[str, str]]]


@dataclass(slots=True)
class Tally:
    """What happened so far. Its lock guards it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    statuses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("accepted", "duplicate", "rejected"), 0))
    reasons: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    refused_requests: int = 0
    shown: int = 0
    recommend_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    def count(self, outcomes: Sequence[dict[str, str]]) -> None:
        with self.lock:
            for outcome in outcomes:
                self.statuses[outcome["status"]] += 1
                if "reason" in outcome:
                    self._because(outcome["reason"])

    def refused(self, reason: str) -> None:
        with self.lock:
            self.refused_requests += 1
            self._because(reason)

    def _because(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < REASONS:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def asked(self, ms: float, shown: bool) -> None:
        with self.lock:
            self.requests += 1
            self.shown += shown
            self.recommend_ms.append(ms)

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to play. `asks_for`: types that a request comes before; `once`: only the first of a session. `name` begins the event ids."""

    rate: float
    asks_for: frozenset[str]
    once: bool
    name: str


class Worker:
    """Plays the events of some users, each user's in order, in a thread of its own."""

    def __init__(self, plan: Plan, client: Client, post: Post, tally: Tally, clock: Clock) -> None:
        self.waiting: queue.Queue[tuple[float, Feedback] | None] = queue.Queue(BACKLOG)
        self._plan, self._client, self._post, self._tally, self._clock = plan, client, post, tally, clock
        self._lists: dict[str, tuple[str, frozenset[str]]] = {}
        self._sessions: set[tuple[str, str | None]] = set()
        self._pending: list[Feedback] = []

    def run(self, stop: Stop) -> None:
        """Until None comes or `stop`. Feedback that is late together goes out together, and never waits for a request."""
        while True:
            if self.waiting.empty() or len(self._pending) == BATCH:
                self._flush()
            got = self.waiting.get()
            if got is None or stop:
                return self._flush()
            due, event = got
            if asks := self._asks(event):
                self._flush()
            self._tally.late_ms.append(1000 * (time.monotonic() - due))
            self._pending.append(self._stamped(event, asks))

    def _flush(self) -> None:
        if self._pending:
            self._tally.count(self._post(self._pending))
            self._pending = []

    def _asks(self, event: Feedback) -> bool:
        if event.type not in self._plan.asks_for:
            return False
        session = (event.user_id, event.session_id)
        if self._plan.once:
            if session in self._sessions:
                return False
            self._sessions.add(session)
        return True

    def _stamped(self, event: Feedback, asks: bool) -> Feedback:
        """The event as of now, with the request that showed its item: the one before it, or the user's last."""
        if asks:
            self._ask(event)
        request_id, shown = self._lists.get(event.user_id, ("", frozenset()))
        return replace(event, time_ms=self._clock.now_ms(), request_id=request_id if event.item_id in shown else None)

    def _ask(self, event: Feedback) -> None:
        asked = {"user_id": event.user_id, "n": N, "session_id": event.session_id, "context": event.context}
        started = time.monotonic()
        self._lists.pop(event.user_id, None)
        try:
            answer = self._client.call("POST", "/v1/recommend", orjson.dumps(asked))
        except Refused as error:  # the click happens without a list
            self._tally.refused(str(error))
            return
        shown = frozenset(item["item_id"] for item in answer["items"])
        self._tally.asked(1000 * (time.monotonic() - started), event.item_id in shown)
        self._lists[event.user_id] = answer["request_id"], shown
        if len(self._lists) > LISTS:
            del self._lists[next(iter(self._lists))]


def play(
    events: Iterator[Feedback], plan: Plan, workers: Sequence[Worker], stop: Stop, progress: Callable[[int], None]
) -> None:
    """Give each event to its user's worker when it is due (open loop), until the last one is sent or `stop`."""
    with ThreadPoolExecutor(len(workers), thread_name_prefix="send") as pool:
        futures = [pool.submit(worker.run, stop) for worker in workers]
        for future in futures:
            future.add_done_callback(lambda done: stop.set() if done.exception() else None)
        try:
            start = time.monotonic()
            for number, event in enumerate(events):
                due = start + number / plan.rate
                if stop or ((wait := due - time.monotonic()) > 0 and stop.wait(wait)):
                    break
                named = replace(event, event_id=f"{plan.name}-{number}")
                _put(workers[zlib.crc32(event.user_id.encode()) % len(workers)], (due, named), stop)
                progress(number + 1)
        except RecsysError:
            stop.set()
            raise
        finally:
            for worker in workers:
                _put(worker, None, stop)
        _wait(futures)


def _put(worker: Worker, what: tuple[float, Feedback] | None, stop: Stop) -> None:
    while not stop:
        with contextlib.suppress(queue.Full):
            worker.waiting.put(what, timeout=0.2)
            return
    with contextlib.suppress(queue.Full):  # a worker with a full queue looks at `stop` before it waits again
        worker.waiting.put_nowait(what)


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def put_items(options: argparse.Namespace, client: Client, stop: Stop, progress: Callable[[int], None]) -> Tally:
    """Put all items of the files, in batches."""
    tally = Tally()
    items = event_files.read_items(options.events)
    while not stop and (batch := list(islice(items, BATCH))):
        tally.count(client.outcomes("PUT", "/v1/items", "items", [messages.dump_item(item) for item in batch]))
        progress(tally.sent)
    return tally


def _checked(options: argparse.Namespace) -> None:
    if not 0 < options.rate < float("inf"):
        raise BadInput(f"--rate {options.rate} must be above 0 events a second", field="rate")
    if options.limit is not None and options.limit < 1:
        raise BadInput(f"--limit {options.limit} must be at least 1: leave it out to send everything", field="limit")
    if options.name is not None:
        messages.parse_id(options.name + "-" + "9" * 12, "--name")


def _over_http(client: Client) -> Post:
    return lambda events: client.outcomes("POST", "/v1/feedback", "events", [messages.dump_feedback(e) for e in events])


def _into(log: EventLog) -> Post:
    def post(events: Sequence[Feedback]) -> list[dict[str, str]]:
        log.append("feedback", [(e.user_id, messages.dump_feedback(e)) for e in events])
        return [{"status": "accepted"}] * len(events)

    return post


@contextlib.contextmanager
def _posting(options: argparse.Namespace, loaded: config.Config, client: Client, clock: Clock) -> Iterator[Post]:
    if options.to == "http":
        yield _over_http(client)
        return
    if loaded.log.kind != "kafka":
        raise BadInput("--to kafka needs a configuration with log.kind = 'kafka': give it with --config", field="to")
    log = open_log(loaded, clock, "send")
    try:
        yield _into(log)
        log.flush()
    finally:
        log.close()


def _quantiles(ms: Sequence[float]) -> dict[str, float | None]:
    if not ms:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(ms, (50, 99)).tolist()
    return {"p50": round(p50, 2), "p99": round(p99, 2)}


def _result(items: Tally, tally: Tally, seconds: float) -> dict[str, Any]:
    good = not (items.statuses["rejected"] or tally.statuses["rejected"] or tally.refused_requests)
    return {
        "ok": good,
        "items": {"sent": items.sent, "rejected": items.statuses["rejected"]},
        "sent": tally.sent,
        **tally.statuses,
        "requests": tally.requests,
        "refused_requests": tally.refused_requests,
        "shown": tally.shown,
        "seconds": round(seconds, 3),
        "rate": round(tally.sent / max(seconds, 1e-9), 2),
        "recommend_ms": _quantiles(tally.recommend_ms),
        "late_ms": _quantiles(tally.late_ms),
        "reasons": {**items.reasons, **tally.reasons},
    }


def run(options: argparse.Namespace) -> int:
    """Put the items, play the feedback, say what came of it."""
    _checked(options)
    loaded, clock, stop, tally = config.load(options.config), SystemClock(), Stop(), Tally()
    num_rows = event_files.count_rows(options.events)
    feedback = (message for _, _, message in event_files.merged(options.events) if isinstance(message, Feedback))
    client = Client(url_of(loaded, options.url), stop)
    plan = Plan(
        rate=options.rate,
        asks_for=frozenset(() if options.requests == "none" else loaded.retrieval.count_types),
        once=options.requests == "first",
        name=options.name or f"send-{clock.now_ms()}",
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    why = ""
    with (
        contextlib.closing(client),
        Progress(*columns, console=Console(stderr=True)) as bar,
        _posting(options, loaded, client, clock) as post,
    ):
        stop.install()
        shown = bar.add_task("items", total=num_rows["item"])
        items = put_items(options, client, stop, lambda done: bar.update(shown, completed=done))
        task = bar.add_task("feedback", total=min(num_rows["feedback"], options.limit or num_rows["feedback"]))
        workers = [Worker(plan, client, post, tally, clock) for _ in range(WORKERS)]
        started = time.monotonic()
        try:
            play(islice(feedback, options.limit), plan, workers, stop, lambda done: bar.update(task, completed=done))
        except BadInput:
            raise
        except RecsysError as error:  # what was sent until then is worth knowing
            why = str(error)
        seconds = time.monotonic() - started
    result = _result(items, tally, seconds)
    if why:
        result |= {"ok": False, "why": why}
    emit(options, result)
    return DONE if result["ok"] else MISSED
