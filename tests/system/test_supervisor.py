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

from tests.system.embedded import ROOT, START_S, Embedded, cmdline, command, environment, wait_for

pytestmark = pytest.mark.system
STOP_S = 10.0


def begun(folder: Path) -> Embedded:
    """`recsys up` with all its services begun, and none ready yet."""
    system = Embedded(folder)
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


def test_services_killed_before_all_were_ready_are_started_again_and_all_stop_in_time(tmp_path: Path) -> None:
    system = begun(tmp_path)
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
        stopped_in_time(system)
        for name in ("ranking", "parameter", "trainer"):
            assert " ERROR " not in (system.data / f"{name}.log").read_text(), "nothing is wrong with an empty system"
    finally:
        system.close()


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
