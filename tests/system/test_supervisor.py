"""`recsys up`: what dies is started again, also before all were ready; told to stop, everything ends within ten seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.system.embedded import ITEMS, ROOT, START_S, Embedded, cmdline, command, environment, wait_for
from tests.system.services import tasks

pytestmark = pytest.mark.system
STOP_S = 10.0
FAST = tasks(0.5, 0.5) + "training.checkpoint_s = 1\nparameter.snapshot_s = 1\n"
KINDS = (
    ("trainer/manifest.json", "dense-*"),
    ("trainer/manifest.json", "segment-*.safetensors"),
    ("ranking/counters.json", "counters-*"),
    ("ranking/catalogue.json", "catalogue-*.columns"),
)


def begun(folder: Path, extra: str = "") -> Embedded:
    """`recsys up` with all its services begun, and none ready yet."""
    system = Embedded(folder, extra)
    with system.output.open("w") as out:
        system.process = subprocess.Popen(
            command(["up", "--config", system.config]), cwd=ROOT, env=environment(), stdout=out, stderr=out, text=True
        )
    wait_for(lambda: len(system.pids()) == 3, "three services", START_S)
    return system


def stopped_in_time(system: Embedded) -> None:
    assert system.process is not None
    children = [child for child in psutil.Process(system.process.pid).children() if cmdline(child)]
    began = time.monotonic()
    assert system.stop() == 0
    assert time.monotonic() - began < STOP_S
    assert not any(psutil.pid_exists(child.pid) for child in children)


def rows(system: Embedded, service: str) -> float:
    return system.metric("recsys_table_rows", service)


def flip(path: Path) -> None:
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes([data[half] ^ 4]) + data[half + 1 :])


def of_newest(manifest: Path, pattern: str) -> Path:
    """The file of this pattern that the newest manifest names."""
    said = manifest.read_text()
    return next(path for path in sorted(manifest.parent.glob(pattern), reverse=True) if path.name in said)


def test_what_dies_is_started_again_and_what_is_flipped_is_made_up_for(tmp_path: Path) -> None:
    """Two services are killed before all are ready; then, after a stop, one byte of a file of each kind is another."""
    system = begun(tmp_path, FAST)
    try:
        killed = {name: system.pids()[name] for name in ("parameter", "trainer")}
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        process = system.process
        assert process is not None
        wait_for(lambda: "ready: API" in system.output.read_text() or process.poll() is not None, "ready", START_S)
        assert process.poll() is None, system.output.read_text()
        said = system.output.read_text()
        for name, pid in killed.items():
            assert f"{name} died with -9" in said and system.pids()[name] != pid
        for name in ("ranking", "parameter", "trainer"):
            assert " ERROR " not in (system.data / f"{name}.log").read_text(), "nothing is wrong with an empty system"
        learn(system)
        before = rows(system, "trainer")
        stopped_in_time(system)
        for manifest, pattern in KINDS:
            flip(of_newest(system.data / manifest, pattern))
        flip(system.data / "parameter/manifest.json")
        system.start()
        wait_for(lambda: rows(system, "trainer") == rows(system, "parameter") == before, "the rows of before")
        assert len(system.history("user-1")) == 3 and system.metric("recsys_catalogue_items") == len(ITEMS)
        for name, times in (("ranking", 2), ("parameter", 1), ("trainer", 1)):
            assert (system.data / f"{name}.log").read_text().count("torn or flipped") >= times, name
    finally:
        system.close()


def learn(system: Embedded) -> None:
    """Lists and clicks, until rows were learned and served and everything was saved at least twice."""
    system.call("PUT", "/v1/items", {"items": ITEMS})
    system.call("GET", "/v1/items/item-199")
    for n in range(6):
        answer = system.call("POST", "/v1/recommend", {"user_id": f"user-{n}", "n": 10})
        for item in answer["items"][:3]:
            system.click({"user_id": f"user-{n}", "item_id": item["item_id"], "request_id": answer["request_id"]})
    wait_for(lambda: system.metric("recsys_examples_total", "trainer") >= 60, "labels learned")
    wait_for(lambda: rows(system, "trainer") == rows(system, "parameter") > 40, "serving has the trainer's rows")
    for service, name in (
        ("trainer", "recsys_checkpoint_seconds_count"),
        ("parameter", "recsys_snapshot_seconds_count"),
    ):
        wait_for(lambda service=service, name=name: system.metric(name, service) >= 2, f"{name} of two")


def test_told_to_stop_while_starting_it_stops(tmp_path: Path) -> None:
    system = begun(tmp_path)
    try:
        stopped_in_time(system)
    finally:
        system.close()


def test_sigterm_is_heard_amid_a_call_that_runs_no_handlers() -> None:
    code = (
        "import hashlib, sys; from services.common.process import Stop; Stop().install(0.3); print('begun', flush=True); "
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(START_S) == 1
