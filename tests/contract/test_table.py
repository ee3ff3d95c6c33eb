"""The table's contract, on every implementation."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from recsys.errors import TableFull
from recsys.table.base import Layout, Rows, Segment, SlotPolicy, Table
from recsys.table.cpu import CpuTable
from recsys.table.reference import ReferenceTable
from recsys.table.warm import warm_up
from tests.table_cuda import COMPILED, cuda_table

EXTREMES = [-1, 0, 1, -(2**63), 2**63 - 1]
DEEP = Segment(name="deep", dim=3, init_scale=0.01)
WIDE = Segment(name="wide", dim=2, optimizer="adagrad", learning_rate=0.1)
PLAIN = Segment(name="plain", dim=1, optimizer="sgd")


def layout_of(
    admission: int = 1,
    expiry_s: float | None = 10.0,
    capacity: int = 100,
    segments: tuple[Segment, ...] = (DEEP, WIDE, PLAIN),
) -> Layout:
    slots = {slot: SlotPolicy(admission=admission, expiry_s=expiry_s) for slot in (0, 1, 7)}
    return Layout(name="test", segments=segments, slots=slots, capacity=capacity, seed=5)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


@pytest.fixture(params=[CpuTable, ReferenceTable, cuda_table])
def make(request: pytest.FixtureRequest) -> type[Table]:
    kind: type[Table] = request.param
    return kind


def turns(make: type[Table], usual: int) -> int:
    """Fewer for kernels in Triton's interpreter, where each takes milliseconds."""
    return usual if COMPILED or make is not cuda_table else usual // 40


def pairs(*given: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in given], np.int32), np.array([k for _, k in given], np.int64)


def keyed(*keys: int, slot: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(keys), slot, np.int32), np.array(keys, np.int64)


def ones(count: int, table: Table) -> np.ndarray:
    return np.ones((count, table.layout.dim), np.float32)


def live(touched: object) -> set[tuple[int, int]]:
    return set(zip(touched.slots.tolist(), touched.keys.tolist(), strict=True))


def gone(touched: object) -> set[tuple[int, int]]:
    return set(zip(touched.removed_slots.tolist(), touched.removed_keys.tolist(), strict=True))


def test_every_key_in_every_slot_has_its_own_row(make: type[Table]) -> None:
    table = make(layout_of())
    slots, keys = pairs(*((slot, key) for slot in (0, 1, 7) for key in EXTREMES))
    values = np.arange(len(keys) * table.layout.dim, dtype=np.float32).reshape(len(keys), -1)
    table.write(slots, keys, values, now_ms=0)
    read, found = table.lookup(slots, keys)
    assert found.all() and (read == values).all() and len(table) == len(keys)


def test_many_keys_survive_growth_and_removal_of_others(make: type[Table]) -> None:
    table = make(layout_of(capacity=3000, segments=(DEEP,)))
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 3000)
    slots = (keys % 2).astype(np.int32)
    for start in range(0, 3000, 300):
        table.lookup_train(slots[start : start + 300], keys[start : start + 300], now_ms=0)
    before, _ = table.lookup(slots, keys)
    table.remove(slots[::3], keys[::3])
    after, found = table.lookup(slots, keys)
    kept = np.arange(3000) % 3 != 0
    assert (found == kept).all() and (after[kept] == before[kept]).all() and len(table) == 2000


def test_missing_key_gets_the_default_row_of_its_slot(make: type[Table]) -> None:
    table = make(layout_of())
    defaults = table.defaults()
    values, found = table.lookup(*pairs((7, 5), (0, 5)))
    assert not found.any()
    assert defaults.slots.tolist() == [0, 1, 7] and (values == defaults.values[[2, 0]]).all()
    assert not np.array_equal(values[0, :3], values[1, :3]) and (values[:, 3:] == 0).all()


def test_new_rows_are_a_uniform_hash_and_equal_in_every_implementation() -> None:
    slots, keys = np.repeat(np.array([0, 1, 7], np.int32), 300), np.tile(np.arange(300), 3)
    first, second = (kind(layout_of(capacity=900)).lookup_train(slots, keys, 0) for kind in (CpuTable, ReferenceTable))
    assert (first == second).all()
    deep = first[:, :3] / np.float32(0.01)
    assert np.abs(deep).max() <= 1 and abs(deep.mean()) < 0.05 and abs(deep.std() - math.sqrt(1 / 3)) < 0.03
    assert len(np.unique(first[:, 0])) > 890


def test_unknown_slot_and_wrong_shapes_are_refused(make: type[Table]) -> None:
    table = make(layout_of())
    for slot in (2, -1, 8, 70_000):
        for call in (table.lookup, table.export, table.remove, lambda s, k: table.lookup_train(s, k, 0)):
            with pytest.raises(ValueError, match=str(slot)):
                call(*keyed(1, slot=slot))
    with pytest.raises(ValueError, match="gradients"):
        table.apply_gradients(*keyed(1), np.ones((1, 5), np.float32), 0)
    with pytest.raises(ValueError, match="length"):
        table.write(*keyed(1, 2), ones(1, table), 0)
    assert len(table) == 0


def test_full_table_refuses_before_anything_changed(make: type[Table]) -> None:
    table = make(layout_of(admission=2, capacity=3))
    table.lookup_train(*keyed(1, 1, 2, 2, 3), now_ms=0)
    with pytest.raises(TableFull, match=r"raise table\.capacity"):
        table.lookup_train(*keyed(3, 4, 4, 5), now_ms=0)
    assert table.pending().counts.tolist() == [1] and len(table) == 2
    with pytest.raises(TableFull):
        table.write(*keyed(1, 8, 9), ones(3, table), 0)
    assert (table.lookup(*keyed(1))[0] != 1).all()
    table.lookup_train(*keyed(3, 3, 1, 2), now_ms=0)
    assert len(table) == 3


@pytest.mark.parametrize("threshold", [1, 2, 16, 40])
def test_any_threshold_admits_at_exactly_that_count(make: type[Table], threshold: int) -> None:
    table = make(layout_of(admission=threshold))
    for _ in range(threshold - 1):
        table.lookup_train(*keyed(5), now_ms=0)
        table.lookup_train(*keyed(5), now_ms=0, admit=False)
    assert len(table) == 0
    table.lookup_train(*keyed(5), now_ms=0)
    assert len(table) == 1 and len(table.pending().keys) == 0


def test_occurrences_in_one_call_count_each(make: type[Table]) -> None:
    table = make(layout_of(admission=3))
    values = table.lookup_train(*pairs((0, 9), (1, 9), (0, 9), (0, 9)), now_ms=0)
    assert len(table) == 1 and (values[0] == values[2]).all()
    assert table.pending().counts.tolist() == [1]


def test_counts_survive_a_restart_and_expire(make: type[Table]) -> None:
    table, other = make(layout_of(admission=3)), make(layout_of(admission=3))
    table.lookup_train(*keyed(4, 4, 6), now_ms=1000)
    table.lookup_train(*keyed(6), now_ms=9000)
    other.restore_pending(table.pending())
    other.expire(now_ms=11_000)
    assert other.pending().keys.tolist() == [6] and other.pending().last_seen_ms.tolist() == [9000]
    other.lookup_train(*keyed(6), now_ms=11_000)
    assert other.lookup(*keyed(4, 6))[1].tolist() == [False, True]


def test_unadmitted_keys_train_the_default_row_only(make: type[Table]) -> None:
    table = make(layout_of(admission=5))
    table.write(*keyed(1), ones(1, table), 0)
    before = table.defaults()
    table.apply_gradients(*keyed(2, 3), ones(2, table), now_ms=0)
    after = table.defaults()
    assert (table.lookup(*keyed(1))[0] == 1).all()
    assert (after.values[0] < before.values[0]).all() and (after.values[1:] == before.values[1:]).all()
    once = make(layout_of(admission=5))
    once.apply_gradients(*keyed(2), 2 * ones(1, once), now_ms=0)
    assert (once.defaults().values == after.values).all() and (once.defaults().state == after.state).all()


def test_duplicates_are_summed_before_one_step(make: type[Table]) -> None:
    table, other = make(layout_of()), make(layout_of())
    for each in (table, other):
        each.lookup_train(*keyed(1, 2), now_ms=0)
    gradients = np.random.default_rng(0).standard_normal((4, table.layout.dim)).astype(np.float32)
    table.apply_gradients(*keyed(1, 2, 1, 1), gradients, now_ms=0)
    total = (gradients[0].astype(np.float64) + gradients[2] + gradients[3]).astype(np.float32)
    other.apply_gradients(*keyed(2, 1), np.stack([gradients[1], total]), now_ms=0)
    assert (table.lookup(*keyed(1, 2))[0] == other.lookup(*keyed(1, 2))[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_change_nothing(make: type[Table], bad: float) -> None:
    table = make(layout_of())
    table.lookup_train(*keyed(1, 2), now_ms=0)
    before = table.export(*keyed(1, 2))
    gradients = ones(2, table)
    gradients[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        table.apply_gradients(*keyed(1, 2), gradients, now_ms=5)
    after = table.export(*keyed(1, 2))
    assert (after.values == before.values).all() and (after.last_seen_ms == 0).all()
    table.apply_gradients(*keyed(1, 2), ones(2, table), now_ms=5)
    assert (table.export(*keyed(1, 2)).values < before.values).all()


def test_optimizers_follow_their_definition_over_1000_steps(make: type[Table]) -> None:
    table = make(layout_of())
    w = table.lookup_train(*keyed(1), now_ms=0)[0].astype(np.float64)
    rowwise, full = 0.1, np.full(2, 0.1)
    rng = np.random.default_rng(3)
    for _ in range(turns(make, 1000)):
        g32 = rng.standard_normal((1, 6)).astype(np.float32)
        table.apply_gradients(*keyed(1), g32, now_ms=0)
        g = g32[0].astype(np.float64)
        rowwise += (g[:3] ** 2).mean()
        full += g[3:5] ** 2
        w[:3] -= 0.05 * g[:3] / (np.sqrt(rowwise) + 1e-8)
        w[3:5] -= 0.1 * g[3:5] / (np.sqrt(full) + 1e-8)
        w[5] -= 0.05 * g[5]
        assert (np.abs(table.lookup(*keyed(1))[0][0] - w) <= 1e-5 * np.maximum(1, np.abs(w))).all()
    np.testing.assert_allclose(table.export(*keyed(1)).state[0], [rowwise, *full], rtol=1e-5)


def test_eviction_gives_memory_and_capacity_back_and_drops_state(make: type[Table]) -> None:
    table = make(layout_of(capacity=50, expiry_s=16.0))
    for generation in range(10):
        keys = np.arange(50) + 1000 * generation
        slots = np.zeros(50, np.int32)
        table.lookup_train(slots, keys, now_ms=generation * 16_000)
        table.apply_gradients(slots, keys, ones(50, table), now_ms=generation * 16_000)
        bytes_used = table.memory_bytes()
        assert table.expire(now_ms=generation * 16_000 + 15_999) == 0
        assert table.expire(now_ms=generation * 16_000 + 16_000) == 50 and len(table) == 0
        if generation == 0:
            first = bytes_used
    assert bytes_used == first
    table.lookup_train(*keyed(9000), now_ms=0)
    assert (table.export(*keyed(9000)).state[0] == np.float32(0.1)).all()


def test_partial_sweeps_reach_every_row(make: type[Table]) -> None:
    table = make(layout_of())
    table.lookup_train(*keyed(*range(40)), now_ms=0)
    table.lookup_train(*keyed(*range(10)), now_ms=50_000)
    removed = [table.expire(now_ms=50_000, max_rows=7) for _ in range(8)]
    assert sum(removed) == 30 and max(removed) <= 7 and len(table) == 10


def test_rows_without_expiry_stay(make: type[Table]) -> None:
    table = make(layout_of(expiry_s=None))
    table.lookup_train(*keyed(1), now_ms=0)
    assert table.expire(now_ms=2**50) == 0 and len(table) == 1


def test_a_new_cursor_gets_every_row(make: type[Table]) -> None:
    table = make(layout_of())
    table.lookup_train(*keyed(1, 2), now_ms=0)
    table.acknowledge("publish", table.touched("publish").version)
    table.lookup_train(*keyed(3), now_ms=0)
    assert live(table.touched("publish")) == {(0, 3)}
    assert live(table.touched("checkpoint")) == {(0, 1), (0, 2), (0, 3)}


def test_touched_forgets_nothing_before_it_is_acknowledged(make: type[Table]) -> None:
    table = make(layout_of(capacity=5000))
    keys = np.arange(5000)
    slots = np.zeros(5000, np.int32)
    table.touched("publish")
    table.lookup_train(slots, keys, now_ms=0)
    first = table.touched("publish")
    table.apply_gradients(*keyed(17), ones(1, table), now_ms=0)
    again = table.touched("publish")
    assert live(first) == live(again) == {(0, key) for key in range(5000)}
    table.acknowledge("publish", first.version)
    assert live(table.touched("publish")) == {(0, 17)}
    table.acknowledge("publish", again.version)
    assert live(table.touched("publish")) == set()
    table.acknowledge("publish", first.version)
    assert live(table.touched("publish")) == set()


def test_a_read_does_not_touch(make: type[Table]) -> None:
    table = make(layout_of())
    table.lookup_train(*keyed(1), now_ms=0)
    table.acknowledge("publish", table.touched("publish").version)
    table.lookup(*keyed(1))
    table.lookup_train(*keyed(1), now_ms=1)
    assert live(table.touched("publish")) == set()


def test_evictions_reach_the_cursor_as_tombstones(make: type[Table]) -> None:
    table = make(layout_of())
    table.lookup_train(*keyed(1, 2, 3), now_ms=0)
    table.acknowledge("publish", table.touched("publish").version)
    table.expire(now_ms=20_000)
    table.lookup_train(*keyed(2), now_ms=20_000)
    taken = table.touched("publish")
    assert gone(taken) == {(0, 1), (0, 3)} and live(taken) == {(0, 2)}
    table.remove(*keyed(2, 99))
    again = table.touched("publish")
    assert gone(again) == {(0, 1), (0, 2), (0, 3)} and live(again) == set()
    table.acknowledge("publish", taken.version)
    assert gone(table.touched("publish")) == {(0, 2)}


def test_a_released_cursor_holds_nothing_and_begins_anew(make: type[Table]) -> None:
    table = make(layout_of())
    table.release("never was")
    table.lookup_train(*keyed(1, 2, 3), now_ms=0)
    version = table.touched("passing").version
    table.release("passing")
    with pytest.raises(ValueError, match="never given"):
        table.acknowledge("passing", version)
    table.remove(*keyed(2))
    assert live(table.touched("passing")) == {(0, 1), (0, 3)} and not gone(table.touched("passing"))


def test_a_version_never_given_is_refused(make: type[Table]) -> None:
    table = make(layout_of())
    with pytest.raises(ValueError, match="never given"):
        table.acknowledge("publish", 1)
    version = table.touched("publish").version
    with pytest.raises(ValueError, match="never given"):
        table.acknowledge("publish", version + 1)


def test_export_and_restore_keep_whole_rows_with_last_seen(make: type[Table]) -> None:
    table, other = make(layout_of()), make(layout_of())
    table.lookup_train(*keyed(*EXTREMES), now_ms=1234)
    table.apply_gradients(*keyed(*EXTREMES), ones(5, table), now_ms=8000 * 2**28)
    rows = table.export(*keyed(*EXTREMES))
    other.restore(rows)
    back = other.export(*keyed(*EXTREMES))
    assert (back.values == rows.values).all() and (back.state == rows.state).all()
    assert (back.last_seen_ms == 8000 * 2**28).all()
    with pytest.raises(KeyError, match="77"):
        other.export(*keyed(-1, 77))


def test_restore_without_state_starts_fresh(make: type[Table]) -> None:
    table = make(layout_of())
    slots, keys = keyed(1)
    none = np.zeros((1, 0), np.float32)
    table.restore(Rows(slots=slots, keys=keys, values=ones(1, table), state=none, last_seen_ms=np.array([3])))
    assert (table.export(slots, keys).state == np.float32(0.1)).all()


def test_empty_calls_are_legal(make: type[Table]) -> None:
    table = make(layout_of())
    assert table.lookup(*keyed())[0].shape == (0, 6)
    assert table.lookup_train(*keyed(), now_ms=0).shape == (0, 6)
    table.apply_gradients(*keyed(), ones(0, table), now_ms=0)
    table.write(*keyed(), ones(0, table), now_ms=0)
    table.remove(*keyed())
    assert table.export(*keyed()).values.shape == (0, 6) and table.expire(now_ms=0) == 0


@pytest.mark.parametrize("verb", ["write", "apply_gradients", "restore"])
def test_readers_beside_a_writer_see_whole_rows(make: type[Table], verb: str) -> None:
    width = 4096 if make is CpuTable else 64  # wide rows: without the lock nearly every run sees a torn one
    table = make(
        layout_of(capacity=4000, segments=(Segment(name="deep", dim=width, optimizer="sgd", learning_rate=1.0),))
    )
    slots, keys = keyed(*range(40))
    own = np.repeat(keys[:, None], width, 1).astype(np.float32)
    table.write(slots, keys, own, now_ms=0)
    torn: list[int] = []
    reads = [0, 0]
    stop = threading.Event()

    def read(reader: int) -> None:
        while not stop.is_set():
            values, found = table.lookup(slots, keys)
            # Each key's values are 64 times the round, and the key: those of another key would show.
            if not found.all() or (values != values[:, :1]).any() or (values[:, 0] % 64 != keys).any():
                torn.append(reader)
            reads[reader] += 1

    readers = [threading.Thread(target=read, args=(n,)) for n in range(2)]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 20
    n = 0
    most = turns(make, 80)
    while (n < most or min(reads) < most) and time.monotonic() < deadline:
        n += 1
        block = own + 64 * n
        if verb == "write":
            table.write(slots, keys, block, 0)
        elif verb == "apply_gradients":
            table.apply_gradients(slots, keys, np.full_like(own, -64), 0)
        else:
            none = np.zeros((40, 0), np.float32)
            table.restore(Rows(slots=slots, keys=keys, values=block, state=none, last_seen_ms=np.zeros(40, np.int64)))
        others = keyed(*range(1000 + 20 * n, 1020 + 20 * n))  # the index grows, and closes gaps, meanwhile
        table.lookup_train(*others, now_ms=0)
        table.remove(*keyed(*range(1000 + 20 * n, 1020 + 20 * n, 2 if n <= most else 1)))
    stop.set()
    for reader in readers:
        reader.join(timeout=10)
    assert not torn and min(reads) >= most
