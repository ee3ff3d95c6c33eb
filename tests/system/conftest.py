"""The running systems that tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from recsys.testing.servers import Server
from tests.system.crash_matrix import Crashed, Matrix, at_once, closing, gaps_of
from tests.system.crashing import Nursery
from tests.system.embedded import ITEMS, Embedded, embedded
from tests.system.services import Services, on_servers


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """One embedded system with 200 items, shared: tests use users and items of their own."""
    with embedded(tmp_path_factory.mktemp("embedded")) as system:
        system.call("PUT", "/v1/items", {"items": ITEMS})
        system.call("GET", "/v1/items/item-199")
        yield system


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks services that have everything loaded."""
    with contextlib.closing(Nursery()) as one:
        yield one


@pytest.fixture(scope="session")
def crashed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    """A system that died at every gap there is."""
    folder = tmp_path_factory.mktemp("crashed")
    with closing(Matrix(folder / "system", "", nursery)) as system:
        result = at_once(system, gaps_of("embedded"), folder / "kept")
        return Crashed(result, folder / "kept", system.loaded)


@pytest.fixture(scope="module")
def deployed(kafka: Server, redis: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """One system on Kafka and Redis for each module, with label windows of seconds."""
    folder = tmp_path_factory.mktemp("deployed")
    extra = on_servers(kafka, redis, folder.name) + "training.checkpoint_s = 1\nparameter.snapshot_s = 1\n"
    with contextlib.closing(Services(folder, extra)) as system:
        yield system.start()
