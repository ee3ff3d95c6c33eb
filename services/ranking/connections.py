"""Connections: how many there may be, and how long each may take to say what it wants and to hear the answer.

uvicorn bounds none of this but the pause between two requests. A full server closes the connection that waited longest for a request;
where none waits, it refuses.
"""

from __future__ import annotations

import asyncio
import math
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from recsys import metrics
from services.common.process import logger
from services.ranking.problems import problem

_SWEEP_S = 0.5
_SPARE = 128
"""Connections above the bound that are heard, to be told that there are too many; beyond them none is."""
_DESCRIPTORS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one server's connections; times in seconds."""

    connections: int = 1024
    """Each may hold 128 kB of what it sent; one address may have half of them."""
    head_bytes: int = 65_536
    head_s: float = 10.0
    """From the connection, or a request's first byte, to the end of its head."""
    body_s: float = 30.0
    """From there to the end of its body: the largest takes 2 s at 4 MB/s."""
    idle_s: float = 10.0
    """Between two requests, whatever is sent there that begins none."""
    drain_s: float = 5.0
    """To send the rest of a body that was refused: closed at once, the client might never read why."""
    write_s: float = 30.0
    """To take some of an answer."""


def affordable(limits: Limits) -> Limits:
    """The limits, with as many connections as this process may have descriptors for; asks for more of them first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY or soft >= 2 * limits.connections:
        return limits
    return Limits(connections=max(soft // 2, 16))


class Guard:
    """All connections of one server, on its event loop. `protocol` makes them, `sweep` ends those whose time is up."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._all: set[Guarded] = set()
        self._hosts: Counter[str] = Counter()
        self._swept_s = 0.0

    def protocol(self, **settings: Any) -> Guarded:
        """A new connection's protocol, as uvicorn asks for it."""
        return Guarded(self, **settings)

    def add(self, one: Guarded) -> None:
        """Count a connection; refuse it, or make room for it, where there are too many."""
        if len(self._all) >= self.limits.connections and (idle := self._longest_idle()) is not None:
            idle.end()
        self._all.add(one)
        self._hosts[one.host] += 1
        if len(self._all) > self.limits.connections + _SPARE:
            one.transport.abort()
        elif len(self._all) > self.limits.connections:
            one.refuse_all(f"{self.limits.connections} connections are open: try again in a second, or add a process")
        elif self._hosts[one.host] > max(self.limits.connections // 2, 1):
            one.refuse_all(f"{self._hosts[one.host] - 1} connections of {one.host} are open: share them, or close some")

    def remove(self, one: Guarded) -> None:
        """Forget a connection. Idempotent."""
        if one in self._all:
            self._all.discard(one)
            self._hosts[one.host] -= 1
            if not self._hosts[one.host]:
                del self._hosts[one.host]

    def _longest_idle(self) -> Guarded | None:
        return min((one for one in self._all if one.waits.idle), key=lambda one: one.waits.until_s, default=None)

    def sweep(self, now_s: float) -> None:
        """End what takes too long. Call often: it looks every half second."""
        if now_s < self._swept_s + _SWEEP_S:
            return
        self._swept_s = now_s
        metrics.CONNECTIONS_FULL.set(len(self._all) / self.limits.connections)
        for one in tuple(self._all):
            try:
                one.expire(now_s)
            except Exception:  # noqa: BLE001 - one connection's trouble must not keep the others from being looked at
                logger.exception("a connection of %s could not be ended", one.host)
                one.transport.abort()


class _Phase(Enum):
    IDLE = "nothing of a request was sent yet"
    HEAD = "the head of the request"
    BODY = "the body of the request"
    ANSWER = "the answer"


class Patience:
    """What of a request a connection waits for, and until when, in seconds of its event loop."""

    def __init__(self, limits: Limits, now_s: Callable[[], float]) -> None:
        self._limits, self._now_s = limits, now_s
        self.phase, self._head_bytes = _Phase.IDLE, 0
        self.until_s = self._write_until_s = math.inf

    @property
    def idle(self) -> bool:
        """Whether the connection could be closed without anybody's noticing: the client sends its next request by another."""
        return self.phase is _Phase.IDLE

    def wait(self, phase: _Phase, seconds: float) -> None:
        """For the next part."""
        self.phase, self._head_bytes = phase, 0
        self.until_s = self._now_s() + seconds

    def drain(self) -> None:
        """What still comes was refused: it may come for a moment, and no longer than it might have."""
        self.until_s = min(self.until_s, self._now_s() + self._limits.drain_s)

    def write(self, paused: bool) -> None:
        """Whether the client takes nothing of its answer at the moment."""
        self._write_until_s = self._now_s() + self._limits.write_s if paused else math.inf

    def more_head(self, num_bytes: int) -> bool:
        """More of a head came; whether it is too long."""
        self._head_bytes += num_bytes
        return self._head_bytes > self._limits.head_bytes

    def over(self, now_s: float) -> bool:
        """Whether what it waits for did not come in time."""
        return now_s > self.until_s

    def stuck(self, now_s: float) -> bool:
        """Whether the client took nothing of its answer for too long."""
        return now_s > self._write_until_s


class Guarded(HttpToolsProtocol):
    """uvicorn's protocol, ended where it waits too long."""

    def __init__(self, guard: Guard, **settings: Any) -> None:
        super().__init__(**settings)
        self._guard, self._limits = guard, guard.limits
        self.waits = Patience(guard.limits, self.loop.time)

    @property
    def host(self) -> str:
        """Where it comes from."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits.wait(_Phase.IDLE, self._limits.head_s)
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.waits.phase
        super().data_received(data)
        if before is self.waits.phase is _Phase.HEAD and self.waits.more_head(len(data)):
            self._refuse(
                431, f"the request's head is over {self._limits.head_bytes} bytes: send fewer, shorter headers"
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waits.wait(_Phase.HEAD, self._limits.head_s)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.waits.wait(_Phase.BODY, self._limits.body_s)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:
            self.waits.wait(_Phase.IDLE, self._limits.idle_s)
        else:
            self.waits.wait(_Phase.ANSWER, math.inf)

    def on_response_complete(self) -> None:
        if self.waits.phase is _Phase.BODY:
            self.waits.drain()
        elif self.waits.phase is _Phase.ANSWER and self.cycle.response_complete:  # else another request waits behind it
            self.waits.wait(_Phase.IDLE, self._limits.idle_s)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.waits.write(paused=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.waits.write(paused=False)

    def refuse_all(self, detail: str) -> None:
        """Answer 503 to whatever it asks."""
        self.app = problem(503, detail, headers={"Retry-After": "1", "Connection": "close"})

    def end(self) -> None:
        """Close it, and count it no more."""
        self._guard.remove(self)
        self.transport.close()

    def expire(self, now_s: float) -> None:
        """End it if its time is up: with 408 while a request comes, without a word else."""
        waits = self.waits
        if waits.stuck(now_s):
            self.transport.abort()
        elif waits.over(now_s):
            if self.transport.is_closing():
                self.transport.abort()
            elif waits.phase is _Phase.HEAD or (waits.phase is _Phase.BODY and not self.cycle.response_started):
                self._refuse(408, f"{waits.phase.value} did not come in time: send it faster, or in smaller parts")
            else:
                self._close()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, and close: what else comes of the request nobody reads."""
        answer = problem(status, detail)
        body = bytes(answer.body)
        head = b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self.waits.wait(self.waits.phase, self._limits.drain_s)
