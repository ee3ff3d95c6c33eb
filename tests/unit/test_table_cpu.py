"""What the CPU table owes beside the contract: no compiling later, memory only as rows come, bounded times."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recsys.table import cursors, kernels, optimizers, upkeep
from recsys.table.base import Layout, Segment, SlotPolicy, Touched
from recsys.table.cpu import CpuTable
from recsys.table.cursors import Cursors
from recsys.table.index import LOAD, KeyIndex
from recsys.table.warm import warm_up

LAYOUT = Layout(
    name="deep",
    segments=(Segment(name="deep", dim=16, init_scale=0.01),),
    slots={0: SlotPolicy(admission=2, expiry_s=10.0)},
    capacity=50_000,
)
LAYOUT_ONE = Layout(
    name="one", segments=(Segment(name="deep", dim=4),), slots={0: SlotPolicy(expiry_s=10.0)}, capacity=50_000
)


def test_nothing_compiles_after_warm_up() -> None:
    warm_up()
    compiled = [kernels.find, kernels.gather, kernels.read, kernels.insert, kernels.put, kernels.unknown]
    compiled += [kernels.read_shared]
    compiled += [upkeep.remove, upkeep.sweep, upkeep.grow, upkeep.small, upkeep.changes, upkeep.relabel]
    compiled += [optimizers.largest, optimizers.chain, optimizers.step]
    before = [len(kernel.signatures) for kernel in compiled]
    assert min(before) >= 1
    table = CpuTable(LAYOUT)
    slots, keys = np.zeros(5000, np.int32), np.arange(10_000)[::2]
    gradients = np.ones((5000, 32), np.float32)[:, ::2]
    for array in (slots, keys, gradients):
        array.flags.writeable = False
    unaligned = np.frombuffer(b"x" + keys.tobytes(), np.int64, offset=1)
    for each in (keys, unaligned):
        table.lookup_train(slots, each, 0)
        table.apply_gradients(slots, each, gradients, 0)
        table.lookup(slots, each)
    taken = table.touched("publish")
    other = CpuTable(LAYOUT)
    other.restore(table.export(taken.slots, taken.keys))
    other.write(slots, unaligned, gradients, 0)
    other.restore_pending(table.pending())
    other.restore_defaults(table.defaults())
    table.expire(20_000, max_rows=100)
    table.remove(slots[:10], unaligned[:10])
    table.touched("publish")
    assert [len(kernel.signatures) for kernel in compiled] == before


def test_memory_is_used_as_rows_come() -> None:
    before = _resident_bytes()
    table = CpuTable(Layout(name="big", segments=LAYOUT.segments, slots={0: SlotPolicy()}, capacity=50_000_000))
    table.lookup_train(np.zeros(1000, np.int32), np.arange(1000), 0)
    assert _resident_bytes() - before < 64 * 2**20
    assert 1000 * 64 < table.memory_bytes() < 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_package_without_a_writable_cache_still_works(tmp_path: Path) -> None:
    source = Path(kernels.__file__).read_text().split("@part\ndef _home")[0]
    (tmp_path / "lonely.py").write_text(source + "\n\nprint(_mix(np.uint64(7)), kernel.__name__)\n")
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "caching.CodeLibraryCacheImpl._locator_classes = []\n"
        "caching.CompileResultCacheImpl._locator_classes = []\n"
        "import lonely\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(kernels.__file__).parents[2]}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(kernels._mix(np.uint64(7)))


def _live(table: CpuTable, cursor: str) -> set[int]:
    return set(table.touched(cursor).keys.tolist())


def test_a_cursor_that_never_acknowledges_loses_nothing_when_codes_run_out() -> None:
    table = CpuTable(LAYOUT_ONE)
    slot = np.zeros(1, np.int32)
    table.lookup_train(slot, np.array([-7]), 0)
    for name in ("checkpoint", "publish"):
        table.acknowledge(name, table.touched(name).version)
    for key in range(1000):
        table.lookup_train(slot, np.array([key]), 0)
        assert key in _live(table, "publish")
        table.acknowledge("publish", table.touched("publish").version)
        assert _live(table, "publish") == set()
    assert _live(table, "checkpoint") == set(range(1000))
    assert _live(table, "new") == {-7, *range(1000)}


def test_codes_that_run_out_bring_back_only_what_was_acknowledged_late() -> None:
    given = Cursors()
    given.take("publish")
    changed = np.zeros(600, np.uint8)
    versions = []
    for n in range(600):
        changed[n] = given.code(changed)
        versions.append(given.take("publish")[0])
    for n in (0, 100, 299, 598):
        given.acknowledge("publish", versions[n])
        due = np.flatnonzero(changed > given.code_after(versions[n]))
        assert set(range(n + 1, 600)) <= set(due.tolist()) and due.min() > n - 16


def _scripted(seed: int) -> Iterator[Touched]:
    """What a table says to two cursors amid writes of all kinds; the second acknowledges seldom."""
    rng = np.random.default_rng(seed)
    table, versions = CpuTable(replace(LAYOUT, order=1)), dict.fromkeys(("publish", "checkpoint"), 0)
    for turn in range(120):
        for _ in range(int(rng.integers(4))):
            keys = rng.integers(0, 9000, int(rng.choice([0, 1, 30, 2000])))
            slots, now_ms = np.zeros(len(keys), np.int32), 1000 * turn
            match rng.integers(6):
                case 0 | 1:
                    table.lookup_train(slots, keys, now_ms)
                case 2 | 3:
                    table.apply_gradients(slots, keys, np.ones((len(keys), 16), np.float32), now_ms)
                case 4:
                    table.write(slots, keys, np.ones((len(keys), 16), np.float32), now_ms)
                case 5:
                    table.remove(slots, keys) if rng.integers(2) else table.expire(now_ms)
            slots[:], keys[:] = 0, -1  # they are the caller's
        for cursor, often in (("publish", 2), ("checkpoint", 12)):
            taken = table.touched(cursor)
            yield taken
            if not rng.integers(often):
                table.acknowledge(cursor, versions[cursor] or taken.version)
            versions[cursor] = taken.version if rng.integers(2) else 0


@pytest.mark.parametrize("seed", range(4))
def test_what_the_list_says_is_what_a_pass_over_all_entries_finds(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(cursors, "SCANNED", 64)
    listed = list(_scripted(seed))
    monkeypatch.setattr(cursors, "SCANNED", 10**9)
    for taken, expected in zip(listed, _scripted(seed), strict=True):
        for name in ("slots", "keys", "removed_slots", "removed_keys"):
            np.testing.assert_array_equal(getattr(taken, name), getattr(expected, name))


def test_to_take_a_few_rows_of_many_looks_at_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table, keys = CpuTable(LAYOUT_ONE), np.arange(40_000)
    slots = np.zeros_like(keys, np.int32)
    table.write(slots, keys, np.ones((len(keys), 4), np.float32), 0)
    for cursor in ("publish", "checkpoint"):
        table.acknowledge(cursor, table.touched(cursor).version)
    monkeypatch.setattr(upkeep, "changes", None)  # a pass over all entries would call it
    for turn in range(3):
        some = keys[turn::16_000]
        table.apply_gradients(slots[: len(some)], some, np.ones((len(some), 4), np.float32), 0)
        assert _live(table, "publish") == set(some.tolist())
        table.acknowledge("publish", table.touched("publish").version)
    assert len(_live(table, "checkpoint")) == 9
    monkeypatch.undo()
    table.apply_gradients(slots, keys, np.ones((len(keys), 4), np.float32), 0)
    assert len(_live(table, "publish")) == len(_live(table, "checkpoint")) == 40_000, "of many no list is kept"
    table.acknowledge("publish", table.touched("publish").version)
    monkeypatch.setattr(upkeep, "changes", None)
    table.apply_gradients(slots[:5], keys[:5], np.ones((5, 4), np.float32), 0)
    assert _live(table, "publish") == set(range(5))


def test_where_nothing_changed_no_entry_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing asks ten times a second what changed."""
    looked: list[int] = []
    changes = upkeep.changes
    monkeypatch.setattr(upkeep, "changes", lambda *given: (looked.append(given[2]), changes(*given))[1])
    table, slot = CpuTable(LAYOUT_ONE), np.zeros(1, np.int32)
    assert _live(table, "publish") == set() and not looked
    table.lookup_train(slot, np.array([1]), 0)
    assert _live(table, "publish") == {1}, "until it is acknowledged it comes again"
    assert _live(table, "publish") == {1}
    table.acknowledge("publish", table.touched("publish").version)
    looked.clear()
    table.lookup(slot, np.array([1]))
    table.lookup_train(slot, np.array([1]), 1)
    assert _live(table, "publish") == set() and not looked
    assert _live(table, "checkpoint") == {1} and looked == [0], "a new cursor gets all"
    table.remove(slot, np.array([1]))
    assert table.touched("publish").removed_keys.tolist() == [1] and len(looked) == 1
    table.apply_gradients(slot, np.array([2]), np.ones((1, 4), np.float32), 0)
    table.lookup_train(slot, np.array([2]), 0)
    assert _live(table, "publish") == {2}


def test_stamps_move_when_time_leaves_their_range() -> None:
    table = CpuTable(LAYOUT_ONE)
    slots, step = np.zeros(1, np.int32), 8000
    table.lookup_train(slots, np.array([1]), 0)
    table.lookup_train(slots, np.array([2]), step * 2**23)
    late = step * 3 * 2**23
    table.lookup_train(slots, np.array([3]), late)
    seen = table.export(np.zeros(3, np.int32), np.array([1, 2, 3])).last_seen_ms.tolist()
    assert seen[2] == late and seen[0] <= seen[1] < late - step * 2**22
    assert table.expire(late + 9_999) == 2 and table.expire(late + 10_000) == 1


def _hostile(name: str, count: int) -> np.ndarray:
    numbers = np.arange(count, dtype=np.int64)
    keys = {
        "sequential": numbers,
        "reversed": numbers[::-1],
        "equal low bits": numbers << 32,
        "equal high bits": numbers | 0x7F << 56,
        "one bucket of the unseeded hash": _unmix(numbers),
    }
    return np.ascontiguousarray(keys[name])


def _unmix(x: np.ndarray) -> np.ndarray:
    """Keys whose unseeded hash is 0, 1, 2, …: the inverse of splitmix64's finaliser."""
    x = x.astype(np.uint64)
    for shift, factor in ((31, 0x319642B2D24D8EC3), (27, 0x96DE1B173F119089)):
        x = (x ^ (x >> np.uint64(shift)) ^ (x >> np.uint64(2 * shift))) * np.uint64(factor)
    x = x ^ (x >> np.uint64(30)) ^ (x >> np.uint64(60))
    return (x - np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


@pytest.mark.parametrize(
    "name", ["sequential", "reversed", "equal low bits", "equal high bits", "one bucket of the unseeded hash"]
)
def test_hostile_keys_are_as_quick_as_random_ones(name: str) -> None:
    count = 50_000
    random = np.random.default_rng(0).permutation(np.arange(count, dtype=np.int64) * 7919 + 1)
    hostile = _hostile(name, count)
    assert len(np.unique(hostile)) == count
    assert min(_seconds(hostile) for _ in range(5)) < 3 * min(_seconds(random) for _ in range(5))


def _enter(index: KeyIndex, slots: np.ndarray, keys: np.ndarray) -> None:
    index.reserve(len(keys))
    at, _ = index.find(slots, keys)
    index.insert(slots, keys, at, np.arange(len(keys), dtype=np.int32))


def _seconds(keys: np.ndarray) -> float:
    index = KeyIndex(len(keys), 1, np.zeros(1, np.int32))
    slots = np.zeros(len(keys), np.int32)
    started = time.thread_time()
    for start in range(0, len(keys), 4096):
        _enter(index, slots[start : start + 4096], keys[start : start + 4096])
    index.find(slots, keys)
    return time.thread_time() - started


def test_rows_in_the_order_of_another_index_do_not_crowd_this_one() -> None:
    table, other = CpuTable(LAYOUT_ONE), CpuTable(LAYOUT_ONE)
    slots = np.zeros(LAYOUT_ONE.capacity, np.int32)
    table.lookup_train(slots, np.arange(LAYOUT_ONE.capacity), 0)
    ordered = table.touched("copy")
    started = time.thread_time()
    other.restore(table.export(ordered.slots, ordered.keys))
    assert time.thread_time() - started < 1 and len(other) == len(table)


def test_the_index_grows_a_little_with_every_call_and_stays_full() -> None:
    index = KeyIndex(200_000, 1, np.zeros(1, np.int32))
    keys = np.arange(200_000, dtype=np.int64)
    before = None
    for start in range(0, 200_000 - 4096, 4096):
        _enter(index, np.zeros(4096, np.int32), keys[start : start + 4096])
        lines, more, split = index.arrays.meta[:3]
        used = int(lines) + (int(more) - int(lines)) * (1 - int(split) / 2**32)
        if before is not None:
            assert used - before < 4096 / (4 * LOAD) + 2 * 256 / 8 + 2
            assert len(index) / (4 * used) > LOAD - 0.02 or start < 100_000
        before = used
        assert len(index.changed()) == len(index)
    found, missing = index.find(np.zeros(len(index), np.int32), keys[: len(index)])
    assert missing == 0 and len(np.unique(found[0])) == len(index)


def test_streamed_and_plain_gathers_are_equal() -> None:
    layout = Layout(name="t", segments=(Segment(name="d", dim=16, init_scale=1.0),), slots={0: SlotPolicy()})
    table = CpuTable(layout)
    slots, keys = np.zeros(70_000, np.int32), np.arange(70_000)
    table.lookup_train(slots[::2], keys[::2], 0)
    streamed, found = table.lookup(slots, keys)
    parts = [table.lookup(slots[n : n + 1000], keys[n : n + 1000])[0] for n in range(0, 70_000, 1000)]
    assert (streamed == np.concatenate(parts)).all() and found[::2].all() and not found[1::2].any()
