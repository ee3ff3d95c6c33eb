"""How many rows a table may have, and what becomes of more: at a load, at a delta, at a split."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recsys import capacity
from recsys.config import Config, parse
from recsys.features.schema import Schema
from recsys.model.layouts import SPARE, layouts, row_bytes, sizes
from recsys.parameters.deltas import Delta, RowDelta, Version
from recsys.parameters.store import ParameterStore
from recsys.table.base import Layout, Rows, Segment, SlotPolicy
from recsys.table.fit import restore_within
from recsys.table.segments import acknowledge, merged, read_segment, resume, take, write_segment
from recsys.table.tables import Tables

NOW_MS = 1_700_000_000_000
LAYOUT = Layout(
    name="deep",
    segments=(Segment(name="deep", dim=2, init_scale=0.01),),
    slots={0: SlotPolicy()},
    capacity=2000,
    spare=SPARE,
)
EVERYTHING = {"retrieval": {"sources": {"bandit": 20}}, "model": {"dim": 16}}


def keyed(*keys: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(keys), np.int32), np.array(keys, np.int64)


def learned(keys: range, capacity: int = 2000) -> Tables:
    """Each key is newer than the one before it."""
    tables = Tables([replace(LAYOUT, capacity=capacity)])
    for key in keys:
        tables["deep"].lookup_train(*keyed(key), NOW_MS + 8000 * key)
    return tables


@pytest.mark.parametrize("given", [{}, {"table": {"precision": "float16", "admission": 3}}])
def test_tables_have_room_for_the_rows_that_their_share_of_memory_holds(given: dict[str, object]) -> None:
    config = parse({**EVERYTHING, **given, "capacity": {"memory_bytes": 100_000_000}})
    made = layouts(config, Schema.of(config))
    assert [layout.name for layout in made] == ["deep", "wide", "tower", "edge"]
    for layout in made:
        share = capacity.bound_bytes(100_000_000, layout.name)
        assert 0.99 * share < layout.capacity * row_bytes(layout) <= share
        assert f"{layout.name} {layout.capacity:,} rows" in sizes(made)
        table = Tables([layout])[layout.name]
        slots = np.full(layout.capacity, min(layout.slots), np.int32)
        for _ in range(layout.slots[min(layout.slots)].admission):
            for start in range(0, layout.capacity, 4096):
                keys = np.arange(start, min(start + 4096, layout.capacity))
                table.lookup_train(slots[: len(keys)], keys, NOW_MS)
        assert len(table) > 0.85 * layout.capacity and table.memory_bytes() < 1.02 * share


def test_a_configured_capacity_is_rows_of_each_layout() -> None:
    config = parse({**EVERYTHING, "table": {"capacity": 1234}})
    assert {layout.capacity for layout in layouts(config, Schema.of(config))} == {1234}
    assert min(layout.capacity for layout in layouts(Config(), Schema.of(Config()))) > 1000


def test_a_table_that_was_made_smaller_opens_and_says_which_rows_went(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, written = learned(range(800)), []
    for number in range(2):
        before["deep"].lookup_train(*keyed(*range(3)), NOW_MS + 8_000_000)
        delta, versions = take(before, "checkpoint")
        written.append(write_segment(tmp_path / f"{number}.safetensors", delta))
        acknowledge(before, "checkpoint", versions)
    chain = [read_segment(tmp_path / each["name"], each["checksum"]) for each in written]
    after = learned(range(0), capacity=500)
    with caplog.at_level(logging.WARNING):
        resume(after, chain, "checkpoint", "publish")
    assert "table deep has room for 500 rows: " in caplog.text
    table = after["deep"]
    assert table.lookup(*keyed(0, 1, 2))[1].all(), "seen often"
    assert table.lookup(*keyed(*range(500, 800)))[1].all() and 300 < len(table) <= 450
    for cursor in ("checkpoint", "publish"):
        gone = set(table.touched(cursor).removed_keys.tolist())
        assert gone == set(range(800)) - {k for k in range(800) if table.lookup(*keyed(k))[1][0]}
    delta, _ = take(after, "checkpoint")
    rest = Tables([replace(LAYOUT, capacity=500)])
    resume(rest, [merged([*chain, delta])], "checkpoint")
    assert len(rest["deep"]) == len(table), "the next load has nothing to leave out"


def test_a_table_that_is_as_large_as_before_loses_nothing_at_a_load(tmp_path: Path) -> None:
    before = learned(range(480), capacity=500)
    delta, _ = take(before, "checkpoint")
    written = write_segment(tmp_path / "0.safetensors", delta)
    after = learned(range(0), capacity=500)
    resume(after, [read_segment(tmp_path / written["name"], written["checksum"])], "checkpoint")
    assert len(after["deep"]) == len(before["deep"]) and not after["deep"].evicted
    assert not len(after["deep"].touched("checkpoint").removed_keys)


def test_a_serving_copy_smaller_than_the_trainers_table_keeps_what_was_seen_last() -> None:
    store = ParameterStore([replace(LAYOUT, capacity=100)], "schema")
    for step in range(1, 60):
        keys = np.arange(10 * step, 10 * step + 30)
        rows = RowDelta(
            layout="deep",
            slots=np.zeros(30, np.int32),
            keys=keys,
            values=np.full((30, 2), step, np.float32),
            last_seen_ms=np.full(30, NOW_MS + 8000 * step),
            removed_slots=np.zeros(0, np.int32),
            removed_keys=np.zeros(0, np.int64),
            default_slots=np.zeros(0, np.int32),
            default_values=np.zeros((0, 2), np.float32),
        )
        assert store.apply(Delta(version=Version(epoch=1, step=step), covers_ms=0, schema="schema", rows=(rows,)))
        values, found = store.tables["deep"].lookup(np.zeros(30, np.int32), keys)
        assert found.all() and (values == step).all() and len(store.tables["deep"]) <= 100


def test_of_more_rows_than_a_table_holds_those_of_least_worth_are_left_out() -> None:
    table = Tables([replace(LAYOUT, capacity=100)])["deep"]
    slots, keys = keyed(*range(1000))
    rows = Rows(
        slots=slots,
        keys=keys,
        values=np.ones((1000, 2), np.float32),
        state=np.zeros((1000, 0), np.float32),
        last_seen_ms=NOW_MS + 8000 * keys,
        uses=np.where(keys < 5, 3, 0).astype(np.uint8),
    )
    assert restore_within(table, rows) == 910
    assert len(table) == 90 and table.lookup(*keyed(*range(5), *range(915, 1000)))[1].all()
