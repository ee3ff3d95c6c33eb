"""SIGKILL at every named gap of every process, and inside steps: afterwards all is accounted for, and equal from the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.testing.servers import Server
from tests.system.crash_matrix import ROWS, Crashed, Matrix, at_once, closing, gaps_of, good, on
from tests.system.crashing import Nursery
from tests.system.gaps import GAPS

pytestmark = pytest.mark.system
ON_SERVERS = (
    "step: between two batches",
    "publish: appended, not acknowledged",
    "checkpoint: manifest renamed",
    "snapshot: manifest not renamed",
    "accept: appended, not answered",
    "state: stored, not counted",
    "spool: with the broker, not acknowledged",
)


def test_a_crash_at_any_gap_loses_nothing_and_changes_nothing(crashed: Crashed) -> None:
    result = crashed.result
    assert good(result), result
    assert result["gaps"].keys() == GAPS.keys() and result["imported"] == ROWS
    assert result["accepted"] > 100 and result["labels"] > 100


def test_nor_does_it_on_kafka_and_redis(nursery: Nursery, tmp_path: Path, kafka: Server, redis: Server) -> None:
    with closing(Matrix(tmp_path, on(kafka.port, redis.port, tmp_path.name), nursery)) as system:
        result = at_once(system, [gap for gap in gaps_of("kafka") if gap.name in ON_SERVERS])
    assert good(result), result
    assert len(result["gaps"]) == len(ON_SERVERS) and result["labels"] > 20
