"""Real servers, started once for all tests that ask for them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.testing import servers
from recsys.testing.servers import Server, kafka_server, redis_server

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker is not None:
    first = 12_000 + 2_500 * (int(worker.removeprefix("gw")) % 8)
    servers.ports = range(first, first + 2_500)

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: kernels then run on the CPU


@pytest.fixture(autouse=True)
def beside_others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a test marked `alone` have the machine to itself where others run beside it (pytest-xdist)."""
    if worker is None:
        yield
        return
    alone = request.node.get_closest_marker("alone") is not None
    folder = tmp_path_factory.getbasetemp().parent  # of all workers of this run
    with (folder / "gate").open("w") as gate, (folder / "tests").open("w") as tests:
        fcntl.flock(gate, fcntl.LOCK_EX)  # who waits to be alone holds it, so that no further test begins
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Kafka broker: KAFKA_HOME where set, otherwise Maven's jars."""
    home = os.environ.get("KAFKA_HOME")
    with kafka_server(tmp_path_factory.mktemp("kafka"), kafka_home=Path(home) if home else None) as server:
        yield server


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis server without persistence."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server
