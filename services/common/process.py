"""What every process does alike: log lines, signals, the folder's lock, /metrics and health."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from recsys import metrics
from recsys.errors import ConfigError, FolderLocked, masked

logger = logging.getLogger("recsys")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What a disk says that may say otherwise later."""


class _Lines(logging.Formatter):
    """Lines and tracebacks without the passwords of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at that moment, not to what it was at the start: commands that run in another's process put their own
    there and close it, and a line to a closed file is a traceback."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Not kept."""
        return sys.stderr


class _Counted(logging.Handler):
    """What is said loudly is also seen from afar."""

    def emit(self, record: logging.LogRecord) -> None:
        metrics.ERRORS_LOGGED.inc()


def setup_logging(process: str, level: int = logging.INFO) -> None:
    """One line an event on stderr: time, process, level, message with fields."""
    handler = _Stderr()
    handler.setFormatter(_Lines(f"%(asctime)s {process} %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler, _Counted(logging.ERROR)], force=True)
    for noisy in ("kafka", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


STOP_S = 8.0
"""A process that was told to stop ends after so long, whatever it is at: half cuts off last checkpoints, double makes ten seconds too
short for it and its supervisor."""


AGAIN_S = 1.0
"""So long after it was interrupted a call that goes on is interrupted again: half may hit what the first one's end has to do."""


class Interrupted(BaseException):
    """SIGTERM or SIGINT came while `Stop.interrupts`."""


class Stop:
    """Set by SIGTERM and SIGINT; loops wait on it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._interrupting = False

    def install(self, limit_s: float | None = None) -> Stop:
        """Hear signals from now on. With `limit_s` also while the main thread is in a long call; so long after one the process ends."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._heard())
        if limit_s is not None:
            threading.Thread(target=self._end_in_time, args=(_signals(), limit_s), name="signals", daemon=True).start()
        return self

    def _end_in_time(self, signals: socket.socket, limit_s: float) -> None:
        """Python runs its handlers between two steps of the main thread; the system tells this socket at once."""
        while not self:
            with contextlib.suppress(TimeoutError):
                if signals.recv(1)[0] in (signal.SIGTERM, signal.SIGINT):
                    self.set()
        deadline = time.monotonic() + limit_s
        while (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(AGAIN_S, left_s))
            if self._interrupting:  # raised where nobody hears it, as in a compiler's callback: once more
                os.kill(os.getpid(), signal.SIGTERM)
        logger.error("not stopped after %.0f s: ends as if it were killed; nothing accepted is lost", limit_s)
        os._exit(1)

    def _heard(self) -> None:
        self.set()
        if self._interrupting:
            raise Interrupted

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """In the main thread, around work that a restart does again and that may take long (loading, compiling): a signal ends
        it at once, with Interrupted."""
        self._interrupting = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def set(self) -> None:
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)


def _signals() -> socket.socket:
    """Gets a byte for each signal that has a handler."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    reading.settimeout(0.5)  # another event loop may take the signals, and tell us by `Stop.set`
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    return reading


def _close_to_others(folder: Path) -> None:
    """What an earlier release made readable by all."""
    found = folder.stat()
    if found.st_mode & 0o077 and found.st_uid == os.getuid():
        folder.chmod(0o700)
        logger.info("data_dir %s was open to others (%o): it is its owner's alone now", folder, found.st_mode & 0o777)


def _full_ratio(folder: Path) -> float:
    try:
        used = shutil.disk_usage(folder)
    except OSError:
        return math.nan
    return used.used / max(1, used.used + used.free)  # what is kept for root alone counts as full


class FolderLock:
    """Holds a folder for one process (flock: gone with the process, however it dies)."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / f"{name}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _close_to_others(folder)
            self._file: TextIOWrapper = path.open("a+")
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"data_dir {str(folder)!r} is not a folder: name one, or a path where none is") from None
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise ConfigError(
                f"data_dir {str(folder)!r} cannot be written ({error.strerror}): make it writable, or set data_dir"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise FolderLocked(
                f"data_dir {str(folder)!r} is used by another running {name}: stop it, or set another data_dir"
            ) from None

        metrics.DISK_FULL.set_function(lambda: _full_ratio(folder))

    def release(self) -> None:
        self._file.close()


def settle_heap() -> None:
    """Once what lives long is there: the garbage collector never looks at it again. Looking through a large heap holds everything up
    for half a second and more. What of it is given up later is still freed, unless it refers to itself."""
    gc.collect()
    gc.freeze()


def bind(host: str, port: int, option: str) -> socket.socket:
    """A bound socket; ConfigError that names `option` when the address cannot be used."""
    # The protocol is named because asyncio turns Nagle's delay off only then: 40 ms an answer otherwise.
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port {port} on {host} cannot be used ({error.strerror}): stop what uses it, or set {option}"
        ) from None
    return sock


_MAX_HEALTH_THREADS = 32


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(_MAX_HEALTH_THREADS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; where all are busy the connection is closed, whose client asks again."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is not worth a traceback."""
        logger.debug("health request of %s ended early: %s", client_address, sys.exc_info()[1])


class HealthServer:
    """/metrics, /healthz (alive) and /readyz (`ready` says the reason when not) for a process without an API."""

    def __init__(self, host: str, port: int, ready: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0  # seconds: a client that sends half a request holds its thread no longer

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path == "/metrics":
                    self._send(200, metrics.render(), "text/plain; version=0.0.4; charset=utf-8")
                elif path == "/healthz":
                    self._send(200, b'{"status":"alive"}', "application/json")
                elif path == "/readyz":
                    reason = ready()
                    body = json.dumps({"status": "not ready" if reason else "ready", "reason": reason}).encode()
                    self._send(503 if reason else 200, body, "application/json")
                else:
                    self._send(
                        404,
                        b'{"type":"about:blank","title":"not found","status":404,'
                        b'"detail":"nothing is here: try /metrics, /healthz or /readyz"}',
                        "application/problem+json",
                    )

            def _send(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        try:
            self._server = _HttpServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what uses it, or set metrics_port"
            ) from None
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
