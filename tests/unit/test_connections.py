"""Connections and bodies of a real server on real sockets, with limits that a test can reach."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import Gauge

from recsys import metrics
from services.ranking.bodies import Bodies
from services.ranking.connections import Guard, Limits
from services.ranking.problems import install

LIMITS = Limits(connections=8, head_bytes=2000, head_s=0.6, body_s=1.0, idle_s=0.6, drain_s=0.5, write_s=0.6)
MAX_BYTES = 300_000
HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
GET = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Serving:
    port: int
    guard: Guard

    def connect(self, data: bytes = b"", host: str = "127.0.0.1") -> socket.socket:
        connection = socket.socket()
        connection.settimeout(20.0)
        connection.bind((host, 0))
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(data)
        return connection


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    app, guard = FastAPI(), Guard(LIMITS)
    install(app)
    bodies = Bodies(MAX_BYTES)

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        async with bodies.read(request) as body:
            return Response(str(len(body)))

    @app.get("/large")
    async def large() -> Response:
        return Response(b"x" * 50_000_000)

    config = uvicorn.Config(app, http=guard.protocol, ws="none", log_level="critical", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not task.done():
            guard.sweep(asyncio.get_running_loop().time())
            await asyncio.sleep(0.02)
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield Serving(sock.getsockname()[1], guard)
    server.should_exit = True
    thread.join(20)


def full(gauge: Gauge) -> float:
    [family] = gauge.collect()
    return family.samples[0].value


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes; reset counts as closed."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(65_536):
            data += more
    return data


def status(connection: socket.socket) -> int:
    """The status that comes first."""
    data = b""
    while b"\r\n" not in data:
        more = connection.recv(4096)
        assert more, "closed without an answer"
        data += more
    return int(data.split(b" ")[1])


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", b""),
        (b"\r\n\r\n", b""),
        (b"POST /echo HT", b"408"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n", b"408"),
        (HEAD % 1000 + b"{", b"408"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
        (HEAD % 2 + b"{}", b"200"),
        (HEAD % 2 + b"{}\r\n\r\n", b"200"),
        (HEAD % (MAX_BYTES + 1) + b"{", b"413"),
    ],
    ids=range(9),
)
def test_whoever_says_no_more_is_let_go(serving: Serving, sent: bytes, says: bytes) -> None:
    with serving.connect(sent) as connection:
        found = answer(connection)
    assert found.split(b" ")[1:2] == ([says] if says else [])
    if says == b"408":
        assert b"connection: close" in found and json.loads(found.split(b"\r\n\r\n", 1)[1])["status"] == 408


def test_a_head_without_end_is_refused(serving: Serving) -> None:
    with serving.connect(b"POST /echo HTTP/1.1\r\nX-Long: ") as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x" * 50_000)
        found = answer(connection)
    assert found[:12] in (b"HTTP/1.1 431", b"")


def test_a_slow_reader_is_let_go(serving: Serving) -> None:
    with serving.connect(GET) as connection:
        wait_until(lambda: full(metrics.CONNECTIONS_FULL) > 0)
        wait_until(lambda: full(metrics.CONNECTIONS_FULL) == 0)
        assert len(answer(connection)) < 50_000_000


def test_a_full_server_lets_go_of_who_waits_and_refuses_where_all_ask(serving: Serving) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(serving.connect(host=f"127.0.0.{n + 2}")) for n in range(LIMITS.connections)]
        asks = [
            stack.enter_context(serving.connect(HEAD % 2 + b"{", host=f"127.0.1.{n + 2}"))
            for n in range(LIMITS.connections)
        ]
        assert all(answer(connection) == b"" for connection in idle)
        refused = stack.enter_context(serving.connect(HEAD % 2 + b"{}", host="127.0.2.2"))
        assert status(refused) == 503
        for connection in asks:
            connection.sendall(b"}")
        assert [status(connection) for connection in asks] == [200] * len(asks)


def test_one_address_has_half_of_the_connections(serving: Serving) -> None:
    with contextlib.ExitStack() as stack:
        asks = [stack.enter_context(serving.connect(HEAD % 2 + b"{")) for _ in range(LIMITS.connections // 2)]
        with serving.connect(HEAD % 2 + b"{}") as one_more:
            found = answer(one_more)
            assert found.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in found
        with serving.connect(HEAD % 2 + b"{}", host="127.0.0.9") as another:
            assert status(another) == 200
        for connection in asks:
            connection.sendall(b"}")
        assert [status(connection) for connection in asks] == [200] * len(asks)


def test_bodies_together_are_bounded_and_small_ones_go_on(serving: Serving) -> None:
    part = b"x" * (MAX_BYTES - 1000)
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(serving.connect(HEAD % MAX_BYTES + part, host=f"127.0.3.{n + 2}")) for n in range(7)
        ]
        statuses = []
        for connection in held:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                statuses.append(status(connection))
        assert statuses and set(statuses) == {503}
        with serving.connect(HEAD % 60_000 + b"x" * 60_000, host="127.0.0.9") as small:
            assert status(small) == 200
        taken = len(held) - len(statuses)
        assert 4 <= taken <= 5  # four bodies together, and 64 kB of each beside
    wait_until(lambda: full(metrics.BODIES_FULL) == 0)
