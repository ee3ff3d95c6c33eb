"""`recsys up`: the three processes under one supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from recsys.config import Config
from recsys.errors import ConfigError, RecsysError
from recsys.streams.positions import REMEDY
from services.cli.client import url_of
from services.common.process import STOP_S, FolderLock, Stop, bind, logger

_WAITS = ("breaker open", "model held back")
"""Beginnings of reasons for which the trainer is not ready, but runs: answers need not wait for an operator."""
ORDER = ("parameter", "trainer", "ranking")
BACKOFF_S = (1.0, 30.0)
"""What died is started again after the first; each death in a row doubles that, up to the second."""
STEADY_S = 60.0
"""A service that lived so long has not died in a row."""
SAY_S = 30.0
"""What is waited for is said this often."""
LOG_BYTES = 64 * 2**20
"""A service's log file that is longer becomes `<name>.log.1`."""
EXIT_USAGE = 2
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In a child, before it runs: a supervisor that is killed takes its services along (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class LogFile:
    """Where one service's lines go; a file that cannot be written stops no service."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0
        """Where the lines of the process begin that writes to it now."""

    def open(self) -> BinaryIO:
        """For a process that is about to start."""
        out = self._open()
        self._start = out.tell() if out.seekable() else 0
        return out

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("ab")
        except OSError as error:
            logger.error("%s: the lines of %s go nowhere", error, self.path.stem)
            return Path(os.devnull).open("ab")

    def last_words(self) -> str:
        """The last thing that the process said, what it said to its user first of all."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._start, file.seek(0, os.SEEK_END) - 65_536))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError as error:
            return str(error)
        said = [line.removeprefix("recsys: ") for line in lines if line.startswith("recsys: ")] or lines
        return said[-1][:1000] if said else ""

    def shorten(self) -> None:
        """Begin it anew once it is long: a file that is written to by its name's end is copied, then cut."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > LOG_BYTES:
                with contextlib.suppress(OSError):
                    shutil.copyfile(self.path, self.path.with_suffix(".log.1"))
                os.truncate(self.path, 0)
                self._start = 0


@dataclass(slots=True)
class Child:
    """One service: its process, its log file, and when it is due again after it died."""

    log: LogFile
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    deaths: int = 0
    due_s: float = 0.0


class Supervisor:
    """Starts the three services, restarts what died, stops all on SIGTERM."""

    def __init__(self, config: Config, arguments: Sequence[str], stop: Stop, *, accept_gap: bool = False) -> None:
        self.config, self._arguments, self._stop = config, list(arguments), stop
        self._accepting = set(ORDER if accept_gap else ())
        """Services that accept a gap at their next start: once, a later gap is for somebody to look at."""
        self._lock = FolderLock(config.data_dir, "up")
        self._children = {name: Child(LogFile(config.data_dir / f"{name}.log")) for name in ORDER}
        self._were_ready = False

    def start(self) -> None:
        """Start all; each writes its log lines to `<data_dir>/<name>.log`. ConfigError when a port cannot be used."""
        self._check_ports()
        self._tend()

    def _check_ports(self) -> None:
        """Before anything starts: otherwise whoever holds the port would answer for our service."""
        taken: dict[int, str] = {}
        with contextlib.ExitStack() as bound:
            for name in ORDER:
                option = f"{name}.port" if name == "ranking" else f"{name}.metrics_port"
                port = self._port(name)
                if not port or port in taken:
                    why = f"is {taken[port]} already" if port else "would be unknown to `recsys up`"
                    raise ConfigError(f"{option} = {port} {why}: set another port")
                taken[port] = option
                bound.enter_context(bind(self.config.ranking.host, port, option))

    def _spawn(self, name: str) -> None:
        accepting = ["--accept-gap"] if name in self._accepting else []
        self._accepting.discard(name)
        child = self._children[name]
        with child.log.open() as out:
            child.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", "serve", name, *self._arguments, *accepting],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        child.started_s = time.monotonic()

    def wait_ready(self, on_wait: Callable[[str], None] = lambda _: None, timeout_s: float | None = None) -> None:
        """Until every service was ready at once, starting again what dies meanwhile.

        ConfigError when one says that the configuration is wrong; RecsysError when told to stop, or after `timeout_s`.
        """
        began_s = said_s = time.monotonic()
        while waiting := next(((name, why) for name in ORDER if (why := self._not_ready(name))), None):
            name, why = waiting
            self._tend()
            if self._stop:
                raise RecsysError(f"stopped before {name} was ready")
            now_s = time.monotonic()
            if timeout_s is not None and now_s - began_s > timeout_s:
                raise RecsysError(
                    f"{name} was not ready after {timeout_s:.0f} s ({why}): see {self._children[name].log.path}"
                )
            if now_s - said_s > SAY_S or (REMEDY in why and said_s == began_s):  # a remedy is said at once
                said_s = now_s
                logger.warning("%s is not ready after %.0f s: %s", name, now_s - began_s, why)
            on_wait(name)
            self._stop.wait(0.05)
        self._were_ready = True

    def _tend(self) -> None:
        """Start what is due, and say of what died why, and when it is due again."""
        for name, child in self._children.items():
            now_s = time.monotonic()
            if child.process is not None and (code := child.process.poll()) is not None:
                self._bury(name, child, code)
            elif child.process is None and now_s >= child.due_s and not self._stop:
                try:
                    self._spawn(name)
                except OSError as error:  # no memory, no process number
                    self._again(name, child, str(error))

    def _bury(self, name: str, child: Child, code: int) -> None:
        why = child.log.last_words() or f"exit code {code}, no message"
        if code == EXIT_USAGE and not self._were_ready:
            raise ConfigError(f"{name} stopped at start: {why}")
        if time.monotonic() - child.started_s > STEADY_S:
            child.deaths = 0
        child.process = None
        self._again(name, child, f"died with {code} ({why}), see {child.log.path}")

    def _again(self, name: str, child: Child, why: str) -> None:
        wait_s = min(BACKOFF_S[0] * 2.0**child.deaths, BACKOFF_S[1])
        child.deaths += 1
        child.due_s = time.monotonic() + wait_s
        logger.error("%s %s; starting it again in %.0f s", name, why, wait_s)

    def _not_ready(self, name: str) -> str:
        try:
            answer = httpx.get(f"{self.url(name)}/readyz", timeout=1.0)
            reason = "" if answer.status_code == 200 else str(answer.json()["reason"])
            return "" if reason.startswith(_WAITS) else reason
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"no answer: {error}"

    def url(self, name: str) -> str:
        """Where a service's /metrics, /healthz and /readyz are."""
        return f"{url_of(self.config, None).rsplit(':', 1)[0]}:{self._port(name)}"

    def _port(self, name: str) -> int:
        return {
            "ranking": self.config.ranking.port,
            "parameter": self.config.parameter.metrics_port,
            "trainer": self.config.trainer.metrics_port,
        }[name]

    def pid(self, name: str) -> int:
        process = self._children[name].process
        return process.pid if process else 0

    def watch(self) -> None:
        """Until SIGTERM. All were ready once, so even a refusal to start (a port, say) may pass."""
        while not self._stop.wait(0.2):
            self._tend()
            for child in self._children.values():
                child.log.shorten()

    def stop(self, timeout_s: float = STOP_S + 1.0) -> None:
        """SIGTERM to all, ranking first; SIGKILL to what does not stop in time."""
        running = {name: self._children[name].process for name in reversed(ORDER)}
        for process in running.values():
            if process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for name, process in running.items():
            if process is None:
                continue
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("%s did not stop in %.0f s: killed", name, timeout_s)
                process.kill()
                process.wait()
        self._lock.release()
