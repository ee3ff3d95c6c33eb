"""`recsys up`: the three processes under one supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from recsys.config import Config
from recsys.errors import RecsysError
from services.common.process import FolderLock, Stop, logger

ORDER = ("parameter", "trainer", "ranking")
START_S = 120.0
RESTART_S = 1.0
EXIT_USAGE = 2


class Supervisor:
    """Starts the three services, restarts one that died, stops all on SIGTERM."""

    def __init__(self, config: Config, arguments: Sequence[str], stop: Stop) -> None:
        self.config, self._arguments, self._stop = config, list(arguments), stop
        self._lock = FolderLock(config.data_dir, "up")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._log_file: Callable[[str], Path] = lambda name: config.data_dir / f"{name}.log"

    def start(self) -> None:
        """Start all; each writes its log lines to `<data_dir>/<name>.log`."""
        for name in ORDER:
            self._spawn(name)

    def _spawn(self, name: str) -> None:
        with self._log_file(name).open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", "serve", name, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait_ready(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Until every service is ready; RecsysError with the last log line of one that stopped."""
        deadline = time.monotonic() + START_S
        for name in ORDER:
            while not self._ready(name):
                self._check_started(name)
                if self._stop or time.monotonic() > deadline:
                    raise RecsysError(f"{name} was not ready after {START_S:.0f} s: see {self._log_file(name)}")
                on_wait(name)
                self._stop.wait(0.05)

    def _check_started(self, name: str) -> None:
        if self._processes[name].poll() is not None:
            lines = self._log_file(name).read_text(errors="replace").strip().splitlines()
            raise RecsysError(f"{name} stopped at start: {lines[-1] if lines else 'no message'}")

    def _ready(self, name: str) -> bool:
        try:
            return httpx.get(f"{self.url(name)}/readyz", timeout=1.0).status_code == 200
        except httpx.HTTPError:
            return False

    def url(self, name: str) -> str:
        """Where a service's /metrics, /healthz and /readyz are."""
        ports = {
            "ranking": self.config.ranking.port,
            "parameter": self.config.parameter.metrics_port,
            "trainer": self.config.trainer.metrics_port,
        }
        return f"http://{self.config.ranking.host}:{ports[name]}"

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def watch(self) -> None:
        """Until SIGTERM: restart what died; a service that says its configuration is wrong ends all."""
        while not self._stop.wait(0.2):
            for name, process in list(self._processes.items()):
                code = process.poll()
                if code is None:
                    continue
                if code == EXIT_USAGE:
                    self._check_started(name)
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
