"""A disk that is full, then read-only, under three services: feedback is refused, answers go on, and nothing accepted is lost."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.crash_matrix import Matrix, closing, good
from tests.system.crashing import Nursery
from tests.system.embedded import wait_for
from tests.system.services import ORDER

pytestmark = pytest.mark.system
DISK_BYTES = 96 * 2**20
WAIT_S = 90.0


def mount(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `data` is a small disk of its own."""
    data = tmp_path / "data"
    data.mkdir()
    done = mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "none", data)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


def fill(path: Path) -> None:
    """Until not one byte more fits."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (2**20, 2**12, 1):
            while True:
                try:
                    os.write(file, bytes(size))
                except OSError:
                    break
    finally:
        os.close(file)


def test_a_full_disk_refuses_feedback_and_a_read_only_one_is_said(nursery: Nursery, disk: Path) -> None:
    with closing(Matrix(disk, "", nursery)) as system:
        system.begin()
        wait_for(lambda: system.metric("recsys_checkpoint_seconds_count", "trainer") > 1, "checkpoints", WAIT_S)
        accepted = len(system.accepted)
        ballast = system.data / "ballast"

        def refused() -> bool:
            fill(ballast)  # a checkpoint that fails gives space back
            answer = system.http.post("/v1/feedback", json={"user_id": "u", "item_id": "item-1", "type": "click"})
            if answer.status_code == 200:
                return False
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0, answer.text
            return True

        wait_for(refused, "feedback refused", WAIT_S)

        def unlogged() -> bool:
            fill(ballast)
            answer = system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": 8})
            assert len(answer["items"]) == 8
            return "unlogged" in answer["degraded"]

        wait_for(unlogged, "answers that say that they are not logged", WAIT_S)

        def waits() -> bool:
            return refused() and bool(re.search("No space left|disk is full", system.output_of("trainer").read_text()))

        wait_for(waits, "the trainer says why it waits", WAIT_S)
        assert {name: process.poll() for name, process in system.processes.items()} == dict.fromkeys(ORDER)

        ballast.unlink()
        wait_for(lambda: len(system.accepted) > accepted + 50, "feedback is accepted again", WAIT_S)
        wait_for(lambda: all(system.ready(name) for name in ORDER), "every process ready", WAIT_S)
        result = system.result()
        assert good(result), result

        users = sorted(set(system.accepted.ids.values()))[:5]
        before = {user: system.history(user) for user in users}
        system.stop_service("ranking")
        assert mount("-o", "remount,ro", system.data).returncode == 0
        for name in ORDER:
            system.spawn(name)
            assert system.processes[name].wait(WAIT_S) == 2
            said = system.output_of(name).read_text()
            assert "cannot be written (Read-only file system): make it writable" in said and "Traceback" not in said
        assert mount("-o", "remount,rw", system.data).returncode == 0
        system.start()
        assert {user: system.history(user) for user in users} == before
