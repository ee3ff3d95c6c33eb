"""Real servers, started once for all tests that ask for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.testing.servers import Server, kafka_server, redis_server

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: kernels then run on the CPU


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
