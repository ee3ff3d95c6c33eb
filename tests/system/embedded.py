"""`recsys up` in embedded mode, as a user starts it: a configuration file, a data folder, free ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from recsys.testing.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
START_S, STOP_S, WAIT_S = 90.0, 20.0, 20.0
PATIENCE = 4.0
"""Limits are what is ample on a calm machine; beside other tests, or somebody else's, things take so many times longer."""
NOW_MS = time.time_ns() // 1_000_000


def wait_for(done: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """The first true answer of `done`; a failure that says `what` is missing when there is none in time.

    It rests twice as long as a look took, up to a second: on busy cores looking must not starve what is waited for.
    """
    began, limit_s = time.monotonic(), PATIENCE * timeout_s
    while True:
        looked = time.monotonic()
        if found := done():
            return found
        now = time.monotonic()
        assert now - began < limit_s, f"{what} did not happen within {limit_s:.0f} s"
        time.sleep(min(1.0, max(0.02, 2 * (now - looked))))


def recsys(*arguments: str | Path, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE * timeout_s,
        check=False,
    )


def command(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "services.cli.main", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[free_port()] = None
    return list(found)


def cmdline(process: psutil.Process) -> list[str]:
    """A process's command line; empty when it just ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


class Embedded:
    """One running `recsys up`."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data = folder, folder / "data"
        self.ports = dict(zip(("ranking", "parameter", "trainer"), free_ports(3), strict=True))
        self.config = folder / "recsys.toml"
        self.config.write_text(
            f"data_dir = {json.dumps(str(self.data))}\n"
            f"ranking.port = {self.ports['ranking']}\n"
            f"parameter.metrics_port = {self.ports['parameter']}\n"
            f"trainer.metrics_port = {self.ports['trainer']}\n{extra}",
            encoding="utf-8",
        )
        self.http = httpx.Client(base_url=self.url("ranking"), timeout=20.0)
        self.process: subprocess.Popen[str] | None = None
        self.output = folder / "up.txt"

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def start(self, *options: str) -> Embedded:
        """Start and wait until it says that it is ready."""
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                command(["up", "--config", self.config, *options]),
                cwd=ROOT,
                env=environment(),
                stdout=out,
                stderr=out,
                text=True,
            )
        wait_for(lambda: "ready: " in self.output.read_text() or self.process.poll() is not None, "ready", START_S)
        assert self.process.poll() is None, self.output.read_text()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def pids(self) -> dict[str, int]:
        """Process ids of the three services."""
        assert self.process is not None
        found = {}
        for child in psutil.Process(self.process.pid).children():
            line = cmdline(child)
            if "serve" in line:
                found[line[line.index("serve") + 1]] = child.pid
        return found

    def ready(self, name: str = "ranking") -> bool:
        try:
            return httpx.get(f"{self.url(name)}/readyz", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def call(self, method: str, path: str, body: Any = None, *, status: int = 200) -> dict[str, Any]:
        """The answer's JSON, after a check of its status."""
        answer = self.http.request(method, path, json=body)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        found: dict[str, Any] = answer.json()
        return found

    def click(self, *clicks: dict[str, Any]) -> list[dict[str, str]]:
        """Send feedback; the outcomes."""
        events = [{"version": 1, "type": "click", **click} for click in clicks]
        answer = self.http.post("/v1/feedback", json={"events": events})
        outcomes: list[dict[str, str]] = answer.json()["outcomes"]
        return outcomes

    def history(self, user_id: str) -> list[str]:
        """Event ids of a user's history."""
        return [e["event_id"] for e in self.call("GET", f"/v1/users/{user_id}")["history"]]

    def metric(self, name: str, service: str = "ranking") -> float:
        """The sum of one metric's samples."""
        text = httpx.get(f"{self.url(service)}/metrics", timeout=5.0).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.stop()


ITEMS = [
    {
        "version": 1,
        "item_id": f"item-{n}",
        "title": f"Thing {n}",
        "attributes": {"category": ("boots", "lamps", "novels", "kayaks")[n % 4], "tags": ["red", "new"]},
    }
    for n in range(200)
]


@contextlib.contextmanager
def embedded(folder: Path, extra: str = "") -> Iterator[Embedded]:
    """A running system; every process is gone at the end."""
    system = Embedded(folder, extra)
    try:
        yield system.start()
    finally:
        system.close()
