"""A light HTTP client and an open-loop driver: they share the machine with what they measure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from load_tests.common import Floats

TIMEOUT_S = 10.0
_IDLE_S = 2.0
"""Connections idle for longer are not used again: the service closes them after 5 s, perhaps just when a request is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A status (0: none within the timeout) and its body."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body of a 200; RuntimeError with the status and the body's beginning for any other."""
        if self.status != 200:
            raise RuntimeError(f"answered {self.status} (0: not at all) {self.body[:300]!r}: see the service's log")
        return orjson.loads(self.body)


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """HTTP/1.1 over kept connections; the one used last is used first, another is opened when all are busy. One event loop."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._host, self._port = host, port
        self._free: list[tuple[float, _Connection]] = []
        self.opened = 0

    async def call(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Send and receive; a connection that breaks or stays silent gives status 0 and is not used again."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._connection()
                reader, writer = connection
                try:
                    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    reply = await _reply(reader)
                except BaseException:
                    writer.close()
                    raise
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return Reply(status=0, body=b"")
        self._free.append((time.monotonic(), connection))
        return reply

    async def post(self, path: str, value: Any) -> Reply:
        return await self.call("POST", path, orjson.dumps(value))

    async def _connection(self) -> _Connection:
        if self._free and time.monotonic() - self._free[-1][0] > _IDLE_S:
            self.close()
        if self._free:
            return self._free.pop()[1]
        self.opened += 1
        return await asyncio.open_connection(self._host, self._port, limit=2**22)

    def close(self) -> None:
        for _, (_, writer) in self._free:
            writer.close()
        self._free.clear()


async def _reply(reader: asyncio.StreamReader) -> Reply:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, _, rest = head.partition(b"\r\ncontent-length:")
    size = int(rest.split(b"\r\n", 1)[0]) if rest else 0
    return Reply(status=int(head[9:12]), body=await reader.readexactly(size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request of an open-loop run: when it was due, since the run's start, and what came of it."""

    due_s: float
    late_s: float
    """How much later than due the driver sent it."""
    latency_s: float
    """From the due instant to the answer: waiting in the driver and in the service counts."""
    ok: bool


def poisson(rate: float, seconds: float, seed: int) -> Floats:
    """Arrival times of a Poisson process, in [0, seconds)."""
    if rate <= 0:
        return np.zeros(0)
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 10))
    times: Floats = np.cumsum(gaps)
    return times[times < seconds]


async def open_loop(due_s: Sequence[float] | Floats, send: Callable[[int], Awaitable[bool]]) -> list[Sample]:
    """Send number i when due_s[i] has come, whether or not earlier ones were answered."""
    started = time.perf_counter()

    async def one(number: int, due: float) -> Sample:
        late = time.perf_counter() - started - due
        ok = await send(number)
        return Sample(due_s=due, late_s=late, latency_s=time.perf_counter() - started - due, ok=ok)

    tasks = []
    for number, due in enumerate(map(float, due_s)):
        if (wait := started + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, due)))
    return [await task for task in tasks]


async def closed_loop(seconds: float, connections: int, send: Callable[[int], Awaitable[bool]]) -> float:
    """Successful calls per second with so many callers, each sending when its last call was answered."""
    done, failed, number = 0, 0, 0
    started = time.perf_counter()

    async def caller() -> None:
        nonlocal done, failed, number
        while time.perf_counter() - started < seconds:
            number += 1
            if await send(number - 1):
                done += 1
            else:
                failed += 1

    await asyncio.gather(*(caller() for _ in range(connections)))
    if failed:
        raise RuntimeError(f"{failed} of {number} calls failed: see the service's log")
    return done / (time.perf_counter() - started)
