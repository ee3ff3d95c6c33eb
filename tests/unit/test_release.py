"""What serving gets of a trainer's state: nothing that is not finite, and the last good checkpoint meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recsys.clock import ManualClock
from recsys.config import parse
from recsys.parameters.deltas import Delta, DeltaReader
from recsys.streams.memory_log import MemoryLog
from recsys.table.base import Rows
from recsys.training.runner import Runner

KEYS = np.arange(5, dtype=np.int64)


def rows(value: float, runner: Runner) -> Rows:
    table = runner.trainer.tables["deep"]
    none = np.zeros((5, 0), np.float32)
    values = np.full((5, table.layout.dim), value, np.float32)
    return Rows(slots=np.zeros(5, np.int32), keys=KEYS, values=values, state=none, last_seen_ms=np.full(5, 1, np.int64))


def published(log: MemoryLog, offset: int = 0) -> list[Delta]:
    """Every delta from an offset on; each can be read, so that all of it is finite."""
    reader = DeltaReader()
    records = log.read("parameters", 0, offset, 10_000)
    return [delta for record in records if (delta := reader.feed(record.value, record.offset)) is not None]


def test_rows_that_are_not_finite_are_held_back_until_they_are(tmp_path: Path) -> None:
    clock = ManualClock(1_700_000_000_000)
    log = MemoryLog(clock)
    runner = Runner(parse({"data_dir": str(tmp_path), "model": {"dim": 4}, "table": {"capacity": 1000}}), log, clock)

    def turn() -> list[Delta]:
        end = log.end("parameters", 0)
        clock.advance(3000)
        runner.turn()
        return published(log, end)

    runner.start()
    assert [delta.whole for delta in published(log)] == ["begin", "", "end"], "a trainer that begins anew says so"
    runner.trainer.tables["deep"].restore(rows(1.0, runner))
    assert any(len(part.keys) for delta in turn() for part in delta.rows)
    runner.trainer.steps += 1
    runner.checkpoint(wait=True)
    good, epoch = runner.trainer.steps, runner.epoch

    runner.trainer.tables["deep"].restore(replace(rows(1.0, runner), values=rows(np.nan, runner).values))
    found = turn()
    assert "'deep' are not finite" in runner.release.held
    assert {delta.version.step for delta in found} == {good} and runner.epoch == epoch + 1
    assert (found[0].whole, found[-1].whole) == ("begin", "end")
    assert not turn() and runner.release.held, "and nothing after it"

    runner.trainer.tables["deep"].restore(rows(2.0, runner))
    values = [part.values for delta in turn() for part in delta.rows if part.layout == "deep" and len(part.keys)]
    assert not runner.release.held and (np.concatenate(values) == 2.0).all()
    runner.close()


def test_while_nothing_changes_nothing_is_copied_or_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock(1_700_000_000_000)
    log = MemoryLog(clock)
    runner = Runner(parse({"data_dir": str(tmp_path), "model": {"dim": 4}, "table": {"capacity": 1000}}), log, clock)
    runner.start()
    table = runner.trainer.tables["deep"]
    table.restore(rows(1.0, runner))

    def turn() -> list[Delta]:
        end = log.end("parameters", 0)
        clock.advance(3000)
        runner.turn()
        return published(log, end)

    assert any(len(part.keys) for delta in turn() for part in delta.rows)
    with monkeypatch.context() as patch:
        for each in runner.trainer.tables.values():
            patch.setattr(each, "export", lambda *_: pytest.fail("rows are copied"))
            patch.setattr(each, "defaults", lambda: pytest.fail("default rows are copied"))
        assert not turn() and not turn()
    table.restore(rows(2.0, runner).take(np.array([3])))
    assert [part.keys.tolist() for delta in turn() for part in delta.rows if part.layout == "deep"] == [[3]]
    runner.close()
