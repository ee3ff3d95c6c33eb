"""Clients of kafka-python: how they are set up, that nothing stays of one that failed, and that no wait in one is endless."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket

from recsys import metrics

_log = logging.getLogger(__name__)
MAX_BATCH_BYTES = 4 * 2**20
"""Largest batch a topic takes: several records of the largest size, with what surrounds them."""


class _Sockets(KafkaNetSocket):
    """Closes the socket of a connection that failed: kafka-python leaves it to the garbage collector, dozens while a broker is away."""

    SCHEMES = ("direct",)

    async def sock_connect(self, net: Any, sock: Any, sockaddr: Any, timeout_at: float | None = None) -> Any:
        try:
            return await super().sock_connect(net, sock, sockaddr, timeout_at=timeout_at)
        except BaseException:
            sock.close()
            raise


NETWORK: dict[str, Any] = {
    "proxy_url": "direct://",
    "request_timeout_ms": 5000,
    "reconnect_backoff_max_ms": 500,  # the default, 30 s, would be added to every outage
    "retry_backoff_ms": 50,
    "bootstrap_timeout_ms": 1000,
}
LONGEST_S = 20.0
"""No call may take longer, whatever it is told: half ends calls that a busy broker answers."""
_STOP_MS = 2000


def opened(kind: Any, **settings: Any) -> Any:
    """A KafkaAdminClient, KafkaConsumer or KafkaProducer; one that cannot be opened leaves no thread and no socket."""
    made: list[Any] = []

    def net(**configs: Any) -> Any:
        made.append(KafkaNetClient(**configs))
        return made[0]

    def end() -> None:
        for one in made:
            _end(one)

    try:
        with bounded(f"a {kind.__name__} to connect", LONGEST_S, end):
            client = kind(kafka_client=net, **NETWORK, **settings)
    except BaseException:
        end()
        raise
    client.recsys_net = made[0]
    return client


def abandon(client: Any) -> None:
    """End a client at once, from any thread: whoever waits in it gets an error; its thread and sockets go."""
    with contextlib.suppress(Exception):  # a producer: what it holds is given up
        client._unregister_cleanup()
        client._sender.force_close()
        client._sender.join(_STOP_MS / 1000)
        client._closed = True
    _end(client.recsys_net)


def _end(net: Any) -> None:
    """Everything of kafka-python's network side; its own `close` waits without an end. A half-open one raises anything."""
    with contextlib.suppress(Exception):
        net._net.stop(timeout_ms=_STOP_MS)
    with contextlib.suppress(Exception):
        net.close()


@contextlib.contextmanager
def bounded(what: str, longest_s: float, end: Callable[[], None]) -> Iterator[None]:
    """A call that waits for `what`: when it takes too long it is named and counted, and `end` is called, which ends the wait."""
    wait = _Wait(what, time.monotonic() + longest_s, end)
    _WATCHDOG.watch(wait)
    try:
        yield
    finally:
        _WATCHDOG.done(wait)


class _Wait:
    def __init__(self, what: str, until_s: float, end: Callable[[], None]) -> None:
        self.what, self.until_s, self.end = what, until_s, end


class _Watchdog:
    """One thread of the process, started by the first wait."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, wait: _Wait) -> None:
        with self._lock:
            self._waits.add(wait)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="log-watchdog", daemon=True)
                self._thread.start()

    def done(self, wait: _Wait) -> None:
        with self._lock:
            self._waits.discard(wait)

    def _run(self) -> None:
        while True:
            time.sleep(1.0)
            now_s = time.monotonic()
            with self._lock:
                overdue = [wait for wait in self._waits if wait.until_s < now_s]
                self._waits.difference_update(overdue)
            for wait in overdue:
                metrics.STUCK_WAITS.inc()
                _log.error("nothing came of waiting for %s: its connections are ended, and made anew", wait.what)
                wait.end()


_WATCHDOG = _Watchdog()
