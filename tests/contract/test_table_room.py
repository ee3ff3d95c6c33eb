"""A table with `spare` makes room by least worth, on every implementation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recsys.table.base import Layout, Pending, Segment, Table
from recsys.table.cpu import CpuTable
from recsys.table.reference import ReferenceTable
from recsys.table.warm import warm_up
from tests.contract.test_table import DEEP, gone, keyed, layout_of, live
from tests.table_cuda import cuda_table

STEP_MS, DAY_MS = 8000, 86_400_000
NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


@pytest.fixture(params=[CpuTable, ReferenceTable, cuda_table])
def every(request: pytest.FixtureRequest) -> type[Table]:
    """For few calls: in Triton's interpreter each takes a third of a second. `TablesAgree` has all verbs on it."""
    kind: type[Table] = request.param
    return kind


@pytest.fixture(params=[CpuTable, ReferenceTable])
def make(request: pytest.FixtureRequest) -> type[Table]:
    kind: type[Table] = request.param
    return kind


def roomy(capacity: int = 100, admission: int = 1, segments: tuple[Segment, ...] = (DEEP,)) -> Layout:
    layout = layout_of(admission=admission, expiry_s=None, capacity=capacity, segments=segments)
    return replace(layout, spare=0.1, order=3)


def flood(table: Table, start: int, count: int, now_ms: int, each: int = 10) -> None:
    """Keys seen once, `each` a call."""
    for first in range(start, start + count, each):
        table.lookup_train(*keyed(*range(first, first + each)), now_ms=now_ms)


def test_a_flood_of_keys_seen_once_pushes_out_nothing_that_is_seen_often(every: type[Table]) -> None:
    table = every(roomy())
    for _ in range(2):
        table.lookup_train(*keyed(*range(20)), now_ms=NOW_MS)
    flood(table, 1000, 300, NOW_MS, each=10 if every is not cuda_table else 60)
    assert table.lookup(*keyed(*range(20)))[1].all()
    assert len(table) <= 90 and table.evicted == 320 - len(table) and table.refused == 0
    assert table.lookup(*keyed(*range(1290, 1300)))[1].all(), "the newest keys have rows"


def test_what_was_seen_often_is_kept_for_days_not_for_ever(make: type[Table]) -> None:
    table = make(roomy())
    for n in range(100):
        table.lookup_train(*keyed(*range(20)), now_ms=NOW_MS + n * STEP_MS)
    assert (np.abs(table.export(*keyed(*range(20))).uses.mean() - np.log2(100)) < 1.5).all()
    flood(table, 1000, 200, NOW_MS + 3 * DAY_MS)
    assert table.lookup(*keyed(*range(20)))[1].all()
    flood(table, 2000, 200, NOW_MS + 20 * DAY_MS)
    assert not table.lookup(*keyed(*range(20)))[1].any()


def test_of_what_was_seen_once_the_oldest_goes_first(make: type[Table]) -> None:
    table = make(roomy())
    for n in range(9):
        flood(table, 10 * n, 10, NOW_MS + n * STEP_MS)
    table.lookup_train(*keyed(*range(200, 210)), now_ms=NOW_MS + 9 * STEP_MS)
    found = table.lookup(*keyed(*range(90)))[1]
    assert not found[:10].any() and found[20:].all()


def test_rows_that_make_room_are_tombstones_and_give_their_memory_back(make: type[Table]) -> None:
    table = make(roomy())
    flood(table, 0, 90, NOW_MS)
    table.acknowledge("publish", table.touched("publish").version)
    first = table.memory_bytes()
    flood(table, 1000, 500, NOW_MS + STEP_MS)
    touched = table.touched("publish")
    assert {(0, key) for key in range(90)} <= gone(touched) and not live(touched) & gone(touched)
    assert live(touched) == {(0, key) for key in range(1000, 1500) if table.lookup(*keyed(key))[1][0]}
    assert table.memory_bytes() <= first * 1.2 + 4000


def test_a_call_larger_than_the_table_leaves_its_last_keys_unadmitted(every: type[Table]) -> None:
    table = every(roomy())
    flood(table, 1000, 80, NOW_MS, each=80)
    values = table.lookup_train(*keyed(*range(130)), now_ms=NOW_MS + STEP_MS)
    found = table.lookup(*keyed(*range(130)))[1]
    assert found[:100].all() and not found[100:].any() and len(table) == 100 and table.refused == 30
    assert (values[100:] == table.defaults().values[0]).all()
    table.apply_gradients(*keyed(*range(130)), np.ones((130, table.layout.dim), np.float32), NOW_MS + STEP_MS)
    table.lookup_train(*keyed(*range(100, 130)), now_ms=NOW_MS + 2 * STEP_MS)
    assert table.lookup(*keyed(*range(100, 130)))[1].all(), "they are admitted when they come again"


def test_counts_of_keys_without_a_row_are_bounded_too(make: type[Table]) -> None:
    table = make(roomy(admission=3))
    for _ in range(2):
        table.lookup_train(*keyed(5, 6), now_ms=NOW_MS)
    flood(table, 1000, 400, NOW_MS)
    assert len(table.pending().keys) <= 100
    table.lookup_train(*keyed(5, 6), now_ms=NOW_MS)
    assert table.lookup(*keyed(5, 6))[1].all(), "what came twice is still counted"
    flood(table, 5000, 250, NOW_MS, each=250)
    assert len(table.pending().keys) <= 100


def test_a_copy_evicts_the_same_rows(make: type[Table]) -> None:
    table, copy = make(roomy()), make(roomy())
    rng = np.random.default_rng(2)
    for n in range(30):
        keys = np.unique(rng.zipf(1.3, 25) % 500)
        slots = (keys % 2).astype(np.int32)
        for each in (table, copy):
            each.lookup_train(slots, keys, NOW_MS + n * 3 * STEP_MS)
        if n % 7 == 0:
            taken = table.touched("copy")
            copy = make(roomy())
            copy.restore(table.export(taken.slots[::-1].copy(), taken.keys[::-1].copy()))
            copy.restore_pending(table.pending())
            table.release("copy")
    assert table.evicted > 50
    assert live(table.touched("a")) == live(copy.touched("a"))


def test_room_is_made_on_demand(every: type[Table]) -> None:
    table = every(replace(roomy(), spare=0.0))
    flood(table, 0, 90, NOW_MS, each=90)
    assert table.make_room(10) == 0
    assert table.make_room(30) == 90 - len(table) >= 20 and len(table) <= 70
    table.make_room(100)
    assert len(table) == 0 and table.make_room(1) == 0


def test_windows_of_a_larger_table_are_those_of_the_reference() -> None:
    layout = replace(roomy(capacity=12_000), segments=(Segment(name="deep", dim=1),))
    tables: list[Table] = [CpuTable(layout), ReferenceTable(layout)]
    rng = np.random.default_rng(0)
    for n in range(14):
        keys = np.unique(rng.integers(0, 2**62, 1600))
        for table in tables:
            table.lookup_train(np.zeros(len(keys), np.int32), keys, NOW_MS + n * STEP_MS)
        assert tables[0].pending().windows.tolist() == tables[1].pending().windows.tolist()
    assert tables[0].evicted == tables[1].evicted > 8000
    assert live(tables[0].touched("a")) == live(tables[1].touched("a"))
    assert tables[0].pending().windows[0] > 0


def test_an_index_under_steady_replacement_stays_evenly_full() -> None:
    table = CpuTable(replace(roomy(capacity=40_000), segments=(Segment(name="deep", dim=1),)))
    for n in range(100):
        keys = np.arange(n * 4000, (n + 1) * 4000)
        table.lookup_train(np.zeros(len(keys), np.int32), keys, NOW_MS + n * STEP_MS)
    used = table._index.arrays.entries[: table._index.positions, 1] != 0
    ends = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(np.int8)))
    assert (ends[1::2] - ends[::2]).max() < 2000, "no part fills up"


def test_pending_of_older_files_begins_windows_anew() -> None:
    none = np.zeros(0, np.int64)
    assert Pending(slots=none.astype(np.int32), keys=none, counts=none, last_seen_ms=none).windows.tolist() == [0, 0]
