"""What the CUDA table owes beside the contract. Without a device its kernels run in Triton's interpreter, and are
compiled for one all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from load_tests import table_gpu
from recsys.keys import mix
from recsys.table.base import Layout, Segment, SlotPolicy, Table
from recsys.table.cpu import CpuTable
from recsys.table.reference import ReferenceTable
from recsys.table.segments import acknowledge, load, read_segment, take, write_segment
from recsys.table.tables import Tables, placed
from tests.table_cuda import COMPILED, cuda_table, index_kernels, kernels, steps

SEGMENTS = (
    Segment(name="deep", dim=5, init_scale=0.01),
    Segment(name="wide", dim=2, optimizer="adagrad", learning_rate=0.1),
    Segment(name="plain", dim=1, optimizer="sgd"),
)
KEYS = np.array([-1, 0, 1, -(2**63), 2**63 - 1, *range(100, 140)])


def layout_of(admission: int = 1, capacity: int = 500, segments: tuple[Segment, ...] = SEGMENTS) -> Layout:
    slots = {slot: SlotPolicy(admission=admission, expiry_s=10.0) for slot in (0, 1, 7)}
    return Layout(name="test", segments=segments, slots=slots, capacity=capacity, seed=5)


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal bits from the interpreter; a device may sum a row's squares in another order."""
    return np.allclose(first, second, rtol=1e-6, atol=1e-9) if COMPILED else np.array_equal(first, second)


def rows_of(table: Table) -> dict[tuple[int, int], tuple[list[float], list[float], int]]:
    """Every row, by slot and key."""
    taken = table.touched("everything")
    rows = table.export(taken.slots, taken.keys)
    whole = zip(rows.values.tolist(), rows.state.tolist(), rows.last_seen_ms.tolist(), strict=True)
    return dict(zip(zip(rows.slots.tolist(), rows.keys.tolist(), strict=True), whole, strict=True))


@pytest.mark.parametrize("admission", [1, 3])
def test_the_same_calls_give_the_answers_of_the_reference(admission: int) -> None:
    layout = layout_of(admission)
    table, reference = cuda_table(layout, chunk_rows=16), ReferenceTable(layout)
    rng = np.random.default_rng(admission)
    now_ms = 0
    for _ in range(12):
        now_ms += int(rng.integers(0, 4000))
        slots, keys = rng.choice(np.array([0, 1, 7], np.int32), 60), rng.choice(KEYS, 60)
        first, second = (t.lookup_train(slots, keys, now_ms) for t in (table, reference))
        assert same(first, second)
        gradients = rng.standard_normal((60, 8)).astype(np.float32)
        for each in (table, reference):
            each.apply_gradients(slots, keys, gradients, now_ms)
            each.remove(slots[:3], keys[:3])
        assert table.expire(now_ms) == reference.expire(now_ms)
        assert len(table) == len(reference)
    taken, expected = table.touched("new"), reference.touched("new")
    pairs = [set(zip(t.slots.tolist(), t.keys.tolist(), strict=True)) for t in (taken, expected)]
    assert pairs[0] == pairs[1] and len(taken.keys) == len(pairs[0])
    for each in (taken.slots, taken.keys):
        assert each.dtype in (np.int32, np.int64)
    ours, theirs = (t.export(expected.slots, expected.keys) for t in (table, reference))
    assert same(ours.values, theirs.values) and same(ours.state, theirs.state)
    assert np.array_equal(ours.last_seen_ms, theirs.last_seen_ms)
    assert same(table.defaults().values, reference.defaults().values)
    counts = [
        sorted(zip(p.slots, p.keys, p.counts, p.last_seen_ms, strict=True))
        for p in (table.pending(), reference.pending())
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("copies", [1, steps.TILE - 1, steps.TILE, steps.TILE + 1, 5 * steps.TILE + 17])
def test_a_very_frequent_key_is_summed_in_float64_with_the_same_bits_every_time(copies: int) -> None:
    layout = layout_of(segments=(Segment(name="deep", dim=4, optimizer="sgd", learning_rate=1.0),))
    keys = np.concatenate([np.arange(100, 110), np.full(copies, 5), np.arange(200, 210)])
    rng = np.random.default_rng(copies)
    rng.shuffle(keys)
    slots = np.zeros(len(keys), np.int32)
    gradients = rng.standard_normal((len(keys), 4)).astype(np.float32)
    answers = []
    for _ in range(2):
        table = cuda_table(layout)
        table.lookup_train(slots, keys, 0)
        table.apply_gradients(slots, keys, gradients, 0)
        answers.append(table.lookup(slots, keys)[0])
    assert np.array_equal(answers[0], answers[1])
    for key in (5, 100, 209):
        total = gradients[keys == key].astype(np.float64).sum(0)
        np.testing.assert_allclose(answers[0][keys == key][0], -total, rtol=1e-6)


def test_the_first_position_of_a_pair_wins_whoever_comes_first() -> None:
    index = cuda_table(layout_of()).rows.index
    keys = torch.tensor([7, 8, 7, 9, 8, 7, 9, 7], device=index.device)
    slots = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.int32, device=index.device)
    cells = torch.full((32,), -1, device=index.device)
    places = torch.zeros(8, dtype=torch.int64, device=index.device)
    late = torch.arange(8, device=index.device) >= 3
    for active in (late, ~late):  # as if the later lanes had won the race
        index_kernels.group[(1,)]((cells, 31), (slots, keys), active, places, 8, (8,))
    assert cells[places].tolist() == [0, 1, 2, 3, 1, 0, 3, 2]


def test_one_key_in_two_slots_with_one_home_has_two_rows() -> None:
    every = np.arange(40_000)
    home = [mix(every.view(np.uint64) + np.uint64(slot) * np.uint64(0xD1342543DE82EF95)) % 1024 for slot in (0, 1)]
    keys = every[home[0] == home[1]]
    assert len(keys) > 20  # found side by side in an index of 1,024 entries, so only their slots tell them apart
    table = cuda_table(layout_of())
    slots = np.repeat(np.array([0, 1], np.int32), len(keys))
    values = np.arange(16 * len(keys), dtype=np.float32).reshape(-1, 8)
    table.write(slots, np.tile(keys, 2), values, 0)
    assert np.array_equal(table.lookup(slots, np.tile(keys, 2))[0], values)
    table.remove(slots[: len(keys)], keys)
    read, found = table.lookup(slots, np.tile(keys, 2))
    assert np.array_equal(found, slots == 1) and np.array_equal(read[found], values[found])


def test_growth_moves_no_chunk_and_loses_no_row() -> None:
    table = cuda_table(layout_of(capacity=3000), chunk_rows=64)
    keys = np.random.default_rng(0).permutation(3000)
    slots = np.zeros(3000, np.int32)
    before = table.lookup_train(slots[:100], keys[:100], 0)
    addresses = [chunk.data_ptr() for chunk in table.rows.values.chunks]
    for start in range(100, 3000, 500):
        table.lookup_train(slots[start : start + 500], keys[start : start + 500], 0)
    grown = [chunk.data_ptr() for chunk in table.rows.values.chunks]
    assert grown[: len(addresses)] == addresses and len(grown) > len(addresses)
    values, found = table.lookup(slots, keys)
    assert found.all() and np.array_equal(values[:100], before) and len(np.unique(values[:, 0])) > 2900


def test_deleted_entries_do_not_fill_the_index() -> None:
    table = cuda_table(layout_of(capacity=200))
    slots = np.zeros(150, np.int32)
    for turn in range(12):
        keys = np.arange(150) + 1000 * turn
        table.lookup_train(slots, keys, 0)
        assert table.lookup(slots, keys)[1].all()
        table.remove(slots, keys)
    assert len(table) == 0 and table.rows.index.index[0].shape[0] <= 4096


def test_a_segment_file_travels_to_the_device_and_back(tmp_path: Path) -> None:
    layout = layout_of(admission=2)
    source, device, back = ReferenceTable(layout), cuda_table(layout), ReferenceTable(layout)
    slots, keys = np.tile(np.array([0, 1, 7], np.int32), 20), np.repeat(np.arange(20), 3)
    source.lookup_train(np.r_[slots, slots[:30]], np.r_[keys, keys[:30]], 5)
    source.apply_gradients(slots, keys, np.ones((60, 8), np.float32), 9000)
    for number, (sender, receiver) in enumerate(((source, device), (device, back))):
        delta, versions = take({"test": sender}, "publish")
        file = write_segment(tmp_path / f"{number}.safetensors", delta)
        load({"test": receiver}, [read_segment(tmp_path / file["name"], file["checksum"])])
        acknowledge({"test": sender}, "publish", versions)
    assert len(device) == 30 and rows_of(source) == rows_of(device) == rows_of(back)
    for each in (device, back):
        assert np.array_equal(each.defaults().values, source.defaults().values)
        assert sorted(each.pending().keys.tolist()) == sorted(source.pending().keys.tolist())


def test_unknown_slot_on_the_device_reads_nan_and_trains_nothing() -> None:
    rows = cuda_table(layout_of()).rows
    slots = torch.tensor([0, 2, 70_000, -1], dtype=torch.int32, device=rows.device)
    keys = torch.tensor([1, 1, 1, 1], device=rows.device)
    values, ordered = rows.lookup_train(slots, keys, 0, 1)
    assert values[1:].isnan().all() and not values[0].isnan().any() and len(rows.index) == 1
    assert ordered.rows.tolist() == [-1, -1, -1, 3]
    before = rows.values.gather(torch.arange(4, dtype=torch.int32, device=rows.device))
    ones = torch.ones((3, 8), device=rows.device)
    ordered = rows.steps.order(rows.index.find(slots, keys)[1:], slots[1:], keys[1:])
    assert int(rows.steps.apply_gradients(ordered, ones, 0, 1)) == 0
    assert torch.equal(rows.values.gather(torch.arange(4, dtype=torch.int32, device=rows.device)), before)
    assert rows.lookup(slots, keys)[0][1:].isnan().all()


def test_the_load_test_compares_with_torch_doing_the_same() -> None:
    device = cuda_table(layout_of()).rows.device
    table, plain = table_gpu.filled(8, 300, device), table_gpu.Plain(8, 300, device)
    everything = torch.arange(300, device=device)
    slots = torch.zeros(2000, dtype=torch.int32, device=device)
    values, found = table.lookup(slots[:300], table_gpu.keys_of(everything))
    assert bool((found >= table.first).all()) and len(table.index) == 300
    plain.weight.copy_(values)
    generator = torch.Generator(device).manual_seed(0)
    for zipf in (False, True):
        numbers = table_gpu.drawn(300, 2000, zipf, generator)
        share = float((numbers == 0).to(torch.float64).mean())
        assert int(numbers.min()) >= 0 and 290 < int(numbers.max()) < 300 and (share > 0.1) == zipf
        gradients = torch.randn((2000, 8), generator=generator, device=device)
        keys = table_gpu.keys_of(numbers)
        trained, rows = table.lookup_train(slots, keys, 1, 1)
        assert torch.allclose(trained, plain.find(numbers), rtol=1e-4, atol=1e-6)
        assert int(table.steps.apply_gradients(rows, gradients, 1, 1)) == 0
        plain.train(numbers, gradients)
    after = table.lookup(slots[:300], table_gpu.keys_of(everything))[0]
    assert torch.allclose(after, plain.weight, rtol=1e-4, atol=1e-5) and not torch.allclose(after, values, atol=1e-3)


@pytest.mark.skipif(COMPILED, reason="a CUDA device is there: measuring takes minutes")
def test_the_load_test_measures_nothing_without_a_device() -> None:
    result = table_gpu.report(seconds=1.0)
    assert result["device"] is None and result["results"] == [] and "not measured" in result["note"]


def test_tables_lie_on_a_device_only_if_there_is_one() -> None:
    assert placed("cpu", "cpu") == "cpu" and placed("auto", "reference") == "reference"
    assert placed("auto", "cpu") == ("cuda" if COMPILED else "cpu")
    (table,) = Tables([layout_of()], placed("auto", "cpu")).values()
    assert isinstance(table, CpuTable) != COMPILED


@pytest.mark.skipif(COMPILED, reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from services.cli.main import BAD, main  # needs more than the machines with a device may have

    config = tmp_path / "config.toml"
    config.write_text(f'data_dir = "{tmp_path / "data"}"\n[parameter]\ndevice = "cuda"\n', encoding="utf-8")
    assert main(["serve", "parameter", "--config", str(config)]) == BAD
    assert "parameter.device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="needs a CUDA device: the interpreter cannot tell waiting from working")
def test_a_batch_never_waits_for_the_device() -> None:
    rows = cuda_table(layout_of(admission=2, capacity=100_000), chunk_rows=2**17).rows
    slots = torch.zeros(1000, dtype=torch.int32, device=rows.device)
    keys = torch.arange(1000, device=rows.device)
    ones = torch.ones((1000, 8), device=rows.device)
    for _ in range(3):
        _, found = rows.lookup_train(slots, keys, 0, 1)
        rows.steps.apply_gradients(found, ones, 0, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, found = rows.lookup_train(slots, keys + 7, 0, 1)
        rows.steps.apply_gradients(found, ones, 0, 1)
        rows.lookup(slots, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_kernel_compiles_for_a_device_and_copies_16_bytes_at_a_time(tmp_path: Path) -> None:
    root = Path(kernels.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.table_cuda"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    instructions = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    defined = vars(index_kernels) | vars(kernels) | vars(steps)
    names = {name for name, value in defined.items() if hasattr(value, "fn") and not name.startswith("_")}
    assert set(instructions) == names
    for name in ("lookup", "gather", "scatter", "step"):
        assert "ld.global.v4" in instructions[name] and "st.global.v4" in instructions[name], name
    assert "atom" in instructions["enter"] and "fma.rn.f64" not in instructions["step"]
