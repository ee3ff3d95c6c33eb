"""Checkpoint and snapshot files of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from recsys.config import Config
from recsys.errors import ConfigError, SchemaMismatch, SnapshotCorrupt
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.table.base import Layout, Pending, Rows, Segment, SlotPolicy, Table
from recsys.table.segments import (
    FORMAT,
    LayoutDelta,
    acknowledge,
    load,
    merge_segments,
    read_segment,
    skip,
    take,
    write_segment,
)
from recsys.table.tables import Tables

GOLDEN = Path(__file__).parent / "golden" / "table_segment_v1.safetensors"
GOLDEN_CHECKSUM = "f6808d5315a29799dff862efd65172c4"
LAYOUTS = (
    Layout(
        name="deep",
        segments=(Segment(name="deep", dim=2, init_scale=0.01),),
        slots={0: SlotPolicy(admission=2, expiry_s=100.0), 3: SlotPolicy()},
        capacity=2000,
    ),
    Layout(
        name="wide", segments=(Segment(name="wide", dim=1, optimizer="sgd"),), slots={9: SlotPolicy()}, capacity=2000
    ),
)


def keyed(*keys: int, slot: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(keys), slot, np.int32), np.array(keys, np.int64)


def contents(tables: Mapping[str, Table]) -> dict[str, dict[str, object]]:
    """Everything a restart must keep, in an order of its own."""
    delta, _ = take(tables, f"look-{np.random.default_rng().integers(2**60)}")
    seen: dict[str, dict[str, object]] = {}
    for name, part in delta.items():
        rows, pending = part.rows, part.pending
        row_values = zip(rows.values.tolist(), rows.state.tolist(), rows.last_seen_ms.tolist(), strict=True)
        counts = zip(pending.counts.tolist(), pending.last_seen_ms.tolist(), strict=True)
        seen[name] = {
            "rows": dict(zip(zip(rows.slots.tolist(), rows.keys.tolist(), strict=True), row_values, strict=True)),
            "pending": dict(zip(zip(pending.slots.tolist(), pending.keys.tolist(), strict=True), counts, strict=True)),
            "defaults": (part.defaults.values.tolist(), part.defaults.state.tolist()),
        }
    return seen


def learn(tables: Tables, keys: list[int], now_ms: int) -> None:
    rng = np.random.default_rng(now_ms)
    for name, slot in (("deep", 0), ("deep", 3), ("wide", 9)):
        slots, ids = keyed(*keys, slot=slot)
        tables[name].lookup_train(slots, ids, now_ms)
        gradients = rng.standard_normal((len(ids), tables[name].layout.dim)).astype(np.float32)
        tables[name].apply_gradients(slots, ids, gradients, now_ms)


def checkpoint(tables: Tables, path: Path) -> tuple[Path, str]:
    delta, versions = take(tables, "checkpoint")
    written = write_segment(path, delta)
    acknowledge(tables, "checkpoint", versions)
    return path, written["checksum"]


@pytest.mark.parametrize("writer", ["cpu", "reference"])
@pytest.mark.parametrize("reader", ["cpu", "reference"])
def test_a_chain_of_files_and_its_merge_give_back_the_tables(tmp_path: Path, writer: str, reader: str) -> None:
    tables = Tables(LAYOUTS, writer)
    chain = []
    for n, keys in enumerate([list(range(30)), [*range(20, 40), -1, -(2**63)], [5, 2**63 - 1], []]):
        learn(tables, keys, now_ms=1000 * n)
        if n == 2:
            tables.expire(now_ms=101_500)
            tables["deep"].remove(*keyed(7, 8))
        if n == 3:
            tables["deep"].write(*keyed(7), np.full((1, 2), 0.5, np.float32), now_ms=3000)
        chain.append(checkpoint(tables, tmp_path / f"{n}.safetensors"))
    expected = contents(tables)
    assert len(expected["deep"]["rows"]) > 30 and expected["deep"]["pending"]

    restored = Tables(LAYOUTS, reader)
    load(restored, [read_segment(*file) for file in chain])
    assert contents(restored) == expected

    base = tmp_path / "base.safetensors"
    merged = merge_segments(chain[:3], base)
    again = Tables(LAYOUTS, reader)
    load(again, [read_segment(base, merged["checksum"]), read_segment(*chain[3])])
    assert contents(again) == expected
    whole = merge_segments([(base, merged["checksum"]), chain[3]], tmp_path / "whole.safetensors")
    delta = read_segment(tmp_path / "whole.safetensors", whole["checksum"])
    assert len(delta["deep"].removed_keys) == 0 and len(delta["deep"].rows.keys) == len(expected["deep"]["rows"])


def test_unacknowledged_changes_come_again(tmp_path: Path) -> None:
    tables = Tables(LAYOUTS)
    learn(tables, [1, 2], now_ms=0)
    lost, _ = take(tables, "checkpoint")
    learn(tables, [3], now_ms=1)
    delta, versions = take(tables, "checkpoint")
    assert set(lost["wide"].rows.keys.tolist()) < set(delta["wide"].rows.keys.tolist()) == {1, 2, 3}
    acknowledge(tables, "checkpoint", versions)
    assert len(take(tables, "checkpoint")[0]["wide"].rows.keys) == 0


def test_after_a_load_a_skipped_cursor_gets_only_what_changes_then() -> None:
    tables, restored = Tables(LAYOUTS), Tables(LAYOUTS)
    learn(tables, list(range(20)), now_ms=0)
    load(restored, [take(tables, "checkpoint")[0]])
    skip(restored, "checkpoint")
    learn(restored, [3, 30], now_ms=1)
    assert set(take(restored, "checkpoint")[0]["wide"].rows.keys.tolist()) == {3, 30}


def test_a_delta_larger_than_one_export_is_whole() -> None:
    layout = Layout(name="wide", segments=LAYOUTS[1].segments, slots={9: SlotPolicy()}, capacity=20_000)
    tables = Tables([layout])
    slots, keys = keyed(*range(20_000), slot=9)
    tables["wide"].write(slots, keys, np.arange(20_000, dtype=np.float32)[:, None], now_ms=0)
    rows = take(tables, "checkpoint")[0]["wide"].rows
    assert len(rows.keys) == 20_000 and (rows.values[:, 0] == rows.keys).all()


def test_a_delta_is_a_copy() -> None:
    tables = Tables(LAYOUTS)
    learn(tables, [1], now_ms=0)
    delta, _ = take(tables, "checkpoint")
    before = delta["wide"].rows.values.copy(), delta["wide"].defaults.values.copy()
    learn(tables, [1], now_ms=1)
    assert (delta["wide"].rows.values == before[0]).all() and (delta["wide"].defaults.values == before[1]).all()


def test_every_truncation_and_flip_is_detected(tmp_path: Path) -> None:
    tables = Tables(LAYOUTS)
    learn(tables, [1, 2, 3], now_ms=0)
    path, checksum = checkpoint(tables, tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at])
        with pytest.raises(SnapshotCorrupt, match=r"a\.safetensors"):
            read_segment(path, checksum)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SnapshotCorrupt, match=r"a\.safetensors"):
            read_segment(path, checksum)
    path.unlink()
    with pytest.raises(SnapshotCorrupt, match="missing"):
        read_segment(path, checksum)


def test_a_file_of_a_later_format_or_of_something_else_is_refused(tmp_path: Path) -> None:
    import hashlib

    for data, message in (
        (GOLDEN.read_bytes().replace(b'"format":"1"', b'"format":"2"'), "upgrade"),
        (b"not a segment at all", "no segment"),
        (b"", "no segment"),
    ):
        path = tmp_path / "b.safetensors"
        path.write_bytes(data)
        with pytest.raises(SnapshotCorrupt, match=message):
            read_segment(path, hashlib.blake2b(data, digest_size=16).hexdigest())


def test_a_write_that_fails_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors.tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_segment(tmp_path / "c.safetensors", {})
    assert not (tmp_path / "c.safetensors").exists()


def test_files_of_other_layouts_are_refused_before_anything_changed() -> None:
    tables = Tables(LAYOUTS)
    learn(tables, [1], now_ms=0)
    delta, _ = take(tables, "checkpoint")
    for given in (
        LAYOUTS[:1],
        (
            LAYOUTS[0],
            Layout(name="wide", segments=(Segment(name="wide", dim=2),), slots={9: SlotPolicy()}, capacity=10),
        ),
        (LAYOUTS[0], Layout(name="wide", segments=LAYOUTS[1].segments, slots={8: SlotPolicy()}, capacity=10)),
    ):
        other = Tables(given)
        with pytest.raises(SchemaMismatch, match="wide"):
            load(other, [delta])
        assert other.num_rows() == 0


def golden_delta() -> dict[str, LayoutDelta]:
    slots, keys = keyed(-1, 0, -(2**63), 2**63 - 1)
    numbers = np.arange(8, dtype=np.float32).reshape(4, 2)
    deep = LayoutDelta(
        rows=Rows(
            slots=slots,
            keys=keys,
            values=numbers,
            state=numbers[:, :1] / 2,
            last_seen_ms=np.arange(4) + 1_700_000_000_000,
        ),
        removed_slots=np.array([0], np.int32),
        removed_keys=np.array([42]),
        defaults=Rows(
            slots=np.array([0, 3], np.int32),
            keys=np.zeros(2, np.int64),
            values=numbers[:2] + 10,
            state=numbers[:2, :1] + 20,
            last_seen_ms=np.zeros(2, np.int64),
        ),
        pending=Pending(
            slots=np.array([0], np.int32),
            keys=np.array([5]),
            counts=np.array([1]),
            last_seen_ms=np.array([1_700_000_000_009]),
        ),
    )
    none, wide = keyed(slot=9), keyed(0, slot=9)
    empty = np.zeros(0, np.int64)
    return {
        "deep": deep,
        "wide": LayoutDelta(
            rows=Rows(
                slots=none[0],
                keys=none[1],
                values=np.zeros((0, 1), np.float32),
                state=np.zeros((0, 0), np.float32),
                last_seen_ms=empty,
            ),
            removed_slots=none[0],
            removed_keys=none[1],
            defaults=Rows(
                slots=wide[0],
                keys=wide[1],
                values=np.full((1, 1), 0.25, np.float32),
                state=np.zeros((1, 0), np.float32),
                last_seen_ms=np.zeros(1, np.int64),
            ),
            pending=Pending(slots=none[0], keys=none[1], counts=empty, last_seen_ms=empty),
        ),
    }


@pytest.mark.parametrize("reader", ["cpu", "reference"])
def test_a_version_1_file_loads_for_ever(reader: str) -> None:
    tables, expected = Tables(LAYOUTS, reader), Tables(LAYOUTS, reader)
    tables["deep"].lookup_train(*keyed(42, 42, slot=0), now_ms=0)
    load(tables, [read_segment(GOLDEN, GOLDEN_CHECKSUM)])
    load(expected, [golden_delta()])
    assert contents(tables) == contents(expected)
    assert contents(tables)["deep"]["rows"][(3, 2**63 - 1)] == (
        [6.0, 7.0],
        [3.0],
        1_700_000_008_000,  # 1_700_000_000_003 in the file: last-seen is kept in steps of 8 s
    )


def test_the_current_writer_writes_what_its_format_number_says(tmp_path: Path) -> None:
    written = write_segment(tmp_path / GOLDEN.name, golden_delta())
    data = (tmp_path / GOLDEN.name).read_bytes()
    assert written["bytes"] == len(data) and written["name"] == GOLDEN.name
    assert FORMAT == 1 and _header(data) == _header(GOLDEN.read_bytes())


def _header(data: bytes) -> object:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_any_number_of_shards_share_the_rows_of_a_snapshot() -> None:
    tables = Tables(LAYOUTS)
    learn(tables, list(range(300)), now_ms=0)
    delta, _ = take(tables, "checkpoint")
    for shards in (1, 2, 5):
        parts = [Tables(LAYOUTS) for _ in range(shards)]
        for number, part in enumerate(parts):
            load(part, [delta], (number, shards))
        seen = [contents(part)["deep"] for part in parts]
        assert sum(len(each["rows"]) for each in seen) == len(tables["deep"])
        assert sum(len(each["pending"]) for each in seen) == len(tables["deep"].pending().keys)
        assert {k: v for each in seen for k, v in each["rows"].items()} == contents(tables)["deep"]["rows"]
        assert min(len(part["wide"]) for part in parts) > 200 / shards


def test_a_flipped_byte_is_found_and_its_place_named(tmp_path: Path) -> None:
    tables = Tables(LAYOUTS)
    for start in range(0, 2000, 500):
        learn(tables, list(range(start, start + 500)), now_ms=0)
    delta, _ = take(tables, "checkpoint")
    path = tmp_path / "s.safetensors"
    written = write_segment(path, {**delta, **{f"copy{n}": delta["deep"] for n in range(30)}})
    data = bytearray(path.read_bytes())
    assert len(data) > 2 * 2**20
    data[2**20 + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotCorrupt, match=f"between bytes {2**20} and {2**21}"):
        read_segment(path, written["checksum"], written["blocks"])
    path.write_bytes(data[: 2**20])
    with pytest.raises(SnapshotCorrupt, match=f"{2**20} bytes, first between bytes {2**20}"):
        read_segment(path, written["checksum"], written["blocks"])


def test_one_call_looks_up_slots_of_many_tables() -> None:
    tables = Tables(LAYOUTS)
    slots, keys = np.array([3, 9, 3, 9], np.int32), np.array([1, 1, 2, 7])
    trained = tables.lookup_train(slots, keys, now_ms=0)
    tables.apply_gradients(slots, keys, np.ones((4, 2), np.float32), now_ms=0)
    values, found = tables.lookup(slots, keys)
    assert found.all() and (values[[1, 3], 1] == 0).all() and (values[:, 0] != trained[:, 0]).all()
    assert (values[[0, 2]] == tables["deep"].lookup(slots[[0, 2]], keys[[0, 2]])[0]).all()
    assert (values[[1, 3], :1] == tables["wide"].lookup(slots[[1, 3]], keys[[1, 3]])[0]).all()
    with pytest.raises(ValueError, match="slot 5 is in no table"):
        tables.lookup(np.array([5], np.int32), keys[:1])
    with pytest.raises(ValueError, match="slot 10"):
        tables.lookup(np.array([10], np.int32), keys[:1])
    with pytest.raises(ValueError, match="not finite"):
        tables.apply_gradients(slots, keys, np.full((4, 2), np.nan, np.float32), now_ms=0)
    both = Tables([LAYOUTS[0], Layout(name="other", segments=LAYOUTS[0].segments, slots={3: SlotPolicy()})])
    with pytest.raises(ValueError, match="slot 3 is in several tables"):
        both.lookup(slots[:1], keys[:1])


def test_the_configuration_decides_precision_and_filter() -> None:
    given = {"precision": "bfloat16", "rounding": "stochastic", "filter_counters": 4000, "admission": 3}
    config = Config.model_validate({"table": given})
    embeddings = [layout for layout in layouts(config, Schema.of(config)) if layout.name != "edge"]  # exact sums
    assert len(embeddings) == 3
    for layout in embeddings:
        assert (layout.precision, layout.rounding, layout.filter_counters) == ("bfloat16", "stochastic", 4000)
    assert layouts(Config(), Schema.of(Config()))[0].rounding == "nearest"
    with pytest.raises(ConfigError, match="row_l2"):
        layouts(Config.model_validate({"table": given, "model": {"row_l2": 0.1}}), Schema.of(config))
