"""Our services started as docker-compose.yml starts them, without Docker: its commands, its environment, local servers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from recsys.testing.servers import Server, free_port
from tests.system.embedded import ROOT, START_S, wait_for
from tests.system.services import now_ms, scrape

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
OURS = ("parameter", "trainer", "ranking")
ADDED = {"RECSYS_TASKS": '[{"name": "click", "types": ["click"], "window_s": 2.0}]'}
"""The one thing that compose does not say: a label window that a test can wait for."""

pytestmark = pytest.mark.system


class Composed:
    """The containers of our services as processes. Mounts become folders, host names this machine; ports stay where they are free."""

    def __init__(self, folder: Path, kafka: Server, redis: Server) -> None:
        self._folder = folder
        self._ports = {port: port if is_free(port) else free_port() for port in (7000, 8000, 8001, 8002)}
        self._addresses = {
            "kafka:9092": f"127.0.0.1:{kafka.port}",
            "redis:6379": f"127.0.0.1:{redis.port}",
            "parameter:7000": f"127.0.0.1:{self._ports[7000]}",
            "0.0.0.0:7000": f"0.0.0.0:{self._ports[7000]}",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        service = COMPOSE[name]
        command = [*entrypoint(), *(self._mapped(name, argument) for argument in service["command"])]
        given = {key: self._mapped(name, value) for key, value in service["environment"].items()}
        basics = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self._folder / f"{name}.txt").open("wb") as out:
            self.processes[name] = subprocess.Popen(
                command, cwd=self._folder, env=basics | given | ADDED, stdout=out, stderr=out
            )

    def _mapped(self, name: str, value: str) -> str:
        for mount in COMPOSE[name]["volumes"]:
            source, target = mount.split(":")[:2]
            outside = ROOT / source if source.startswith("./") else self._folder / source
            value = re.sub(rf"^{re.escape(target)}(?=/|$)", str(outside), value)
        for there, here in self._addresses.items():
            value = value.replace(there, here)
        return str(self._ports[int(value)]) if value.isdigit() else value

    def url(self, name: str) -> str:
        """Where the service's health check looks, on this machine."""
        [port] = re.findall(r"http://127.0.0.1:(\d+)/readyz", COMPOSE[name]["healthcheck"]["test"][-1])
        return f"http://127.0.0.1:{self._ports[int(port)]}"

    def healthy(self, name: str) -> bool:
        assert self.processes[name].poll() is None, (self._folder / f"{name}.txt").read_text()
        try:
            return httpx.get(f"{self.url(name)}/readyz", timeout=3.0).status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str, metric: str) -> float:
        return sum(value for series, _, value in scrape(self.url(name)) if series == metric)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def entrypoint() -> list[str]:
    """The image's: its program is our package's script."""
    [line] = re.findall(
        r"^ENTRYPOINT (.*)$", (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert yaml.safe_load(line) == ["recsys"], shlex.quote(line)
    return [sys.executable, "-m", "services.cli.main"]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def composed(kafka: Server, redis: Server, tmp_path: Path) -> Iterator[Composed]:
    system = Composed(tmp_path, kafka, redis)
    try:
        yield system
    finally:
        system.close()


def test_services_of_compose_become_healthy_answer_learn_and_stop(composed: Composed) -> None:
    for name in OURS:
        composed.start(name)
    for name in OURS:
        wait_for(lambda name=name: composed.healthy(name), f"{name} healthy", START_S)
    api = composed.url("ranking")
    items = [{"version": 1, "item_id": f"c-{n}", "attributes": {"category": f"kind-{n % 3}"}} for n in range(30)]
    httpx.put(f"{api}/v1/items", json={"items": items}).raise_for_status()
    events = [{"version": 1, "user_id": "compose", "item_id": f"c-{n}", "type": "click"} for n in (0, 3, 6)]
    httpx.post(f"{api}/v1/feedback", json={"events": events}, timeout=30.0).raise_for_status()
    answer = wait_for(lambda: full_answer(api), "a full list with predictions of trained weights", 60.0)
    click = events[0] | {"item_id": answer["items"][0]["item_id"], "request_id": answer["request_id"]}
    httpx.post(f"{api}/v1/feedback", json=click | {"time_ms": now_ms()}).raise_for_status()
    wait_for(lambda: composed.metric("trainer", "recsys_examples_total") >= 5, "the labels of the list learned", 60.0)
    step = composed.metric("parameter", "recsys_parameter_version_step")
    wait_for(
        lambda: composed.metric("parameter", "recsys_parameter_version_step") >= step > 0, "a newer version served"
    )
    for name in OURS:
        stops_in_its_grace_period(composed, name)


def full_answer(api: str) -> dict[str, object] | None:
    found = httpx.post(f"{api}/v1/recommend", json={"user_id": "compose", "n": 5}, timeout=30.0).json()
    good = len(found["items"]) == 5 and not found["degraded"] and found["model_version"].split(".")[2] != "0"
    return found if good else None


def stops_in_its_grace_period(composed: Composed, name: str) -> None:
    process = composed.processes[name]
    grace = COMPOSE[name]["stop_grace_period"]
    assert grace.endswith("s")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(float(grace[:-1])) == 0
    assert not any(child.is_running() for child in children)
