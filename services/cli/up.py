"""`recsys up`: the three processes under one supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from recsys.config import Config
from recsys.errors import ConfigError, RecsysError
from services.cli.client import url_of
from services.common.process import FolderLock, Stop, bind, logger

ORDER = ("parameter", "trainer", "ranking")
START_S = 120.0
RESTART_S = 1.0
EXIT_USAGE = 2
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In a child, before it runs: a supervisor that is killed takes its services along (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Supervisor:
    """Starts the three services, restarts one that died, stops all on SIGTERM."""

    def __init__(self, config: Config, arguments: Sequence[str], stop: Stop) -> None:
        self.config, self._arguments, self._stop = config, list(arguments), stop
        self._lock = FolderLock(config.data_dir, "up")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._log_start: dict[str, int] = {}
        self._log_file: Callable[[str], Path] = lambda name: config.data_dir / f"{name}.log"

    def start(self) -> None:
        """Start all; each writes its log lines to `<data_dir>/<name>.log`. ConfigError when a port cannot be used."""
        self._check_ports()
        for name in ORDER:
            self._spawn(name)

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
        with self._log_file(name).open("ab") as out:
            self._log_start[name] = out.tell()
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", "serve", name, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait_ready(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Until every service is ready; RecsysError with the last log line of one that stopped, or when told to stop."""
        deadline = time.monotonic() + START_S
        for name in ORDER:
            while reason := self._not_ready(name):
                self._check_started(name)
                if self._stop:
                    raise RecsysError(f"stopped before {name} was ready")
                if time.monotonic() > deadline:
                    raise RecsysError(
                        f"{name} was not ready after {START_S:.0f} s ({reason}): see {self._log_file(name)}"
                    )
                on_wait(name)
                self._stop.wait(0.05)

    def _check_started(self, name: str) -> None:
        code = self._processes[name].poll()
        if code is None:
            return
        lines = self._log_file(name).read_bytes()[self._log_start[name] :].decode(errors="replace").splitlines()
        said = [line.removeprefix("recsys: ") for line in lines if line.startswith("recsys: ")] or lines
        message = f"{name} stopped at start: {said[-1] if said else f'exit code {code}, no message'}"
        raise ConfigError(message) if code == EXIT_USAGE else RecsysError(message)

    def _not_ready(self, name: str) -> str:
        try:
            answer = httpx.get(f"{self.url(name)}/readyz", timeout=1.0)
            return "" if answer.status_code == 200 else str(answer.json()["reason"])
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
        return self._processes[name].pid

    def watch(self) -> None:
        """Until SIGTERM: restart what died. All were ready once, so even a refusal to start (a full disk, say) may pass."""
        while not self._stop.wait(0.2):
            for name, process in list(self._processes.items()):
                code = process.poll()
                if code is None:
                    continue
                logger.error("%s died with %d; starting it again, see %s", name, code, self._log_file(name))
                self._stop.wait(RESTART_S)
                if not self._stop:
                    self._spawn(name)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM to all, ranking first; SIGKILL to what does not stop in time."""
        for name in reversed(ORDER):
            process = self._processes.get(name)
            if process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for name, process in self._processes.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("%s did not stop in %.0f s: killed", name, timeout_s)
                process.kill()
                process.wait()
        self._lock.release()
