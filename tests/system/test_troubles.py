"""Everything delivered twice, FLUSHALL, a broker that was away, another partition: nothing is lost and all is counted once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recsys.testing.servers import Server
from tests.system.crash_matrix import Matrix, closing, good, on
from tests.system.crashing import Nursery
from tests.system.troubles import run

pytestmark = pytest.mark.system


def test_trouble_with_the_log_and_the_store_loses_nothing(
    nursery: Nursery, tmp_path: Path, kafka: Server, redis: Server
) -> None:
    with closing(Matrix(tmp_path, on(kafka.port, redis.port, tmp_path.name), nursery)) as system:
        result = run(system, kafka, redis, 2.0)
    assert good(result), json.dumps(result)
    assert len(result["recovery_s"]) == 4 and result["labels"] > 20
