"""Checkpoint and snapshot files: what changed in all tables since a cursor acknowledged, in one safetensors file.

Tensors are named `<layout>/<field>`; the metadata names format and layouts. Version 1 loads for ever (golden file).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.files import Written, fresh, read_file, write_file
from recsys.keys import mix
from recsys.table.base import Pending, Rows, Table
from recsys.table.fit import bury, restore_within
from recsys.types import Int32, Int64

logger = logging.getLogger("recsys")
FORMAT = 1
_EXPORT_ROWS = 8192
"""Rows copied in one call: readers of the table wait at most 2 ms for it."""


_OPTIONAL = ("uses", "sketch", "sketch_ms", "windows")
"""Fields that files of older releases, or of layouts that have none, do not have."""
SegmentFile = Written


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutDelta:
    """What changed in one table: rows and tombstones (disjoint); default rows and counts in full. Arrays are copies."""

    rows: Rows
    removed_slots: Int32
    removed_keys: Int64
    defaults: Rows
    pending: Pending


TablesDelta = Mapping[str, LayoutDelta]
"""What changed in each table, by name of its layout."""


def take(tables: Mapping[str, Table], cursor: str) -> tuple[dict[str, LayoutDelta], dict[str, int]]:
    """Copy what `cursor` has not acknowledged, and the versions to acknowledge later. For the writer's thread."""
    deltas, versions = {}, {}
    for name, table in tables.items():
        touched = table.touched(cursor)
        versions[name] = touched.version
        deltas[name] = LayoutDelta(
            rows=_export(table, touched.slots, touched.keys),
            removed_slots=touched.removed_slots,
            removed_keys=touched.removed_keys,
            defaults=table.defaults(),
            pending=table.pending(),
        )
    return deltas, versions


def _export(table: Table, slots: Int32, keys: Int64) -> Rows:
    starts = range(0, max(len(keys), 1), _EXPORT_ROWS)
    parts = [table.export(slots[at : at + _EXPORT_ROWS], keys[at : at + _EXPORT_ROWS]) for at in starts]
    return Rows(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)})


def skip(tables: Mapping[str, Table], cursor: str) -> None:
    """Acknowledge everything as it is, uncopied: after `load`, for a cursor whose receiver has those files."""
    acknowledge(tables, cursor, {name: table.touched(cursor).version for name, table in tables.items()})


def acknowledge(tables: Mapping[str, Table], cursor: str, versions: Mapping[str, int]) -> None:
    """Forget, for this cursor, what `take` returned with these versions."""
    for name, version in versions.items():
        tables[name].acknowledge(cursor, version)


def shard_of(slots: Int32, keys: Int64, shards: int) -> Int32:
    """Which of so many shards each row belongs to [N]: by the top bits of its mixed key."""
    mixed = mix(mix(slots.astype(np.uint64)) + keys.view(np.uint64)) >> np.uint64(32)
    return (mixed * np.uint64(shards) >> np.uint64(32)).astype(np.int32)


def load(
    tables: Mapping[str, Table], deltas: Sequence[TablesDelta], shard: tuple[int, int] = (0, 1)
) -> dict[str, Rows]:
    """Apply deltas, oldest first; of their rows and counts those of `shard` (number, of how many), whatever shards wrote
    them. SchemaMismatch if they have other layouts than the tables.

    Returns the rows of tables that have become too small for them: those of least worth were left out (`fit.bury` tells
    cursors of it).
    """
    if shard[1] > 1:
        deltas = [{name: _of_shard(part, shard) for name, part in delta.items()} for delta in deltas]
    too_small = set()
    for delta in deltas:
        for name, part in delta.items():
            _check_fits(name, part, tables)
        for name, part in delta.items():
            table = tables[name]
            table.remove(part.removed_slots, part.removed_keys)
            before = table.evicted
            if restore_within(table, part.rows) or table.evicted > before:
                too_small.add(name)
            table.restore_defaults(part.defaults)
            table.restore_pending(part.pending)
    left = {name: _merge([delta[name] for delta in deltas]).rows for name in too_small}
    return {name: rows.take(~tables[name].lookup(rows.slots, rows.keys)[1]) for name, rows in left.items()}


def resume(tables: Mapping[str, Table], deltas: Sequence[TablesDelta], *cursors: str) -> None:
    """Load what these cursors' receivers have: they get what changes from now on, and tombstones for what a table that has
    become too small could not take, which is said aloud."""
    left_out = load(tables, deltas)
    for cursor in cursors:
        skip(tables, cursor)
    for name, rows in left_out.items():
        room = tables[name].layout.capacity
        logger.warning("table %s has room for %d rows: %d rows of least worth are gone", name, room, len(rows.keys))
    bury(tables, left_out)


def _of_shard(part: LayoutDelta, shard: tuple[int, int]) -> LayoutDelta:
    def kept(slots: Int32, keys: Int64) -> npt.NDArray[np.bool_]:
        return np.asarray(shard_of(slots, keys, shard[1]) == shard[0])

    rows, pending = part.rows, part.pending
    of_rows, of_removed = kept(rows.slots, rows.keys), kept(part.removed_slots, part.removed_keys)
    of_pending = kept(pending.slots, pending.keys)
    counts = {f.name: getattr(pending, f.name)[of_pending] for f in fields(Pending)[:4]}
    return LayoutDelta(
        rows=rows.take(of_rows),
        removed_slots=part.removed_slots[of_removed],
        removed_keys=part.removed_keys[of_removed],
        defaults=part.defaults,
        pending=replace(pending, **counts),
    )


def write_segment(path: Path, delta: TablesDelta, *, twice: bool = False) -> SegmentFile:
    """Write a file that is either whole or not there, with a copy of it if `twice`."""
    tensors = {f"{name}/{field}": array for name, part in delta.items() for field, array in _flatten(part).items()}
    data = to_bytes(tensors, {"format": str(FORMAT), "layouts": json.dumps(sorted(delta))})
    return write_file(path, data, twice=twice)


def read_segment(path: Path, checksum: str, blocks: Sequence[int] = ()) -> dict[str, LayoutDelta]:
    """Read a file back. SnapshotCorrupt names the file if it is missing, torn, flipped (with `blocks`: where) or of a later
    format."""
    data = read_file(path, checksum, blocks)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if int(header["format"]) > FORMAT:
            raise SnapshotCorrupt(
                f"segment {str(path)!r} has format {header['format']}, this is {FORMAT}: upgrade first"
            )
        tensors = from_bytes(data)
        return {name: _unflatten(name, tensors) for name in json.loads(header["layouts"])}
    except (ValueError, KeyError, SafetensorError) as error:
        raise SnapshotCorrupt(f"segment {str(path)!r} is no segment ({error}): delete it") from error


def read_chain(folder: Path, chain: Iterable[SegmentFile]) -> list[dict[str, LayoutDelta]]:
    """The files that a manifest names, oldest first. SnapshotCorrupt as `read_segment`."""
    return [read_segment(folder / s["name"], s["checksum"], s.get("blocks", ())) for s in chain]


def merged(parts: Sequence[TablesDelta]) -> dict[str, LayoutDelta]:
    """Deltas, oldest first and beginning with a base, as one base: the later row wins; tombstones are applied and dropped."""
    return {name: _merge([part[name] for part in parts]) for name in parts[-1]} if parts else {}


def merge_segments(sources: Sequence[tuple[Path, str]], target: Path) -> SegmentFile:
    """Fold (path, checksum) pairs, oldest first and beginning with a base, into a new base.

    For a background thread: it reads no live table.
    """
    return write_segment(target, merged([read_segment(path, checksum) for path, checksum in sources]))


def _merge(parts: Sequence[LayoutDelta]) -> LayoutDelta:
    def joined(arrays: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate(list(arrays))

    lengths = [len(part.rows.keys) for part in parts]
    gone = [len(part.removed_keys) for part in parts]
    rows = {f.name: joined(getattr(part.rows, f.name) for part in parts) for f in fields(Rows)[:-1]}
    rows["uses"] = joined(part.rows.levels for part in parts)
    slots = np.concatenate([rows["slots"], *(part.removed_slots for part in parts)])
    keys = np.concatenate([rows["keys"], *(part.removed_keys for part in parts)])
    age = np.concatenate([np.repeat(np.arange(len(parts)), lengths), np.repeat(np.arange(len(parts)), gone)])
    order = np.lexsort((age, keys, slots))
    last = np.ones(len(order), np.bool_)
    last[:-1] = (np.diff(slots[order]) != 0) | (keys[order][1:] != keys[order][:-1])
    chosen = order[last]
    chosen = np.sort(chosen[chosen < sum(lengths)])
    return LayoutDelta(
        rows=Rows(**{name: array[chosen] for name, array in rows.items()}),
        removed_slots=np.zeros(0, np.int32),
        removed_keys=np.zeros(0, np.int64),
        defaults=parts[-1].defaults,
        pending=parts[-1].pending,
    )


def _flatten(part: LayoutDelta) -> dict[str, npt.NDArray[Any]]:
    flat = {f.name: getattr(part.rows, f.name) for f in fields(Rows)[:-1]}
    if len(part.rows.uses):
        flat |= {"uses": part.rows.uses}
    flat |= {"removed_slots": part.removed_slots, "removed_keys": part.removed_keys}
    flat |= {f"defaults_{f.name}": getattr(part.defaults, f.name) for f in fields(Rows)[:-1]}
    flat |= {f"pending_{f.name}": getattr(part.pending, f.name) for f in fields(Pending)[:4]}
    if part.pending.windows.any():
        flat |= {"pending_windows": part.pending.windows}
    if len(part.pending.sketch):
        flat |= {"sketch": part.pending.sketch, "sketch_ms": np.array([part.pending.sketch_ms])}
    return {name: np.ascontiguousarray(array) for name, array in flat.items()}


def _unflatten(layout: str, tensors: Mapping[str, npt.NDArray[Any]]) -> LayoutDelta:
    def value(prefix: str, kind: type[Any]) -> dict[str, Any]:
        named = {f.name: f"{layout}/{prefix}{f.name}" for f in fields(kind)}
        return {name: tensors[at] for name, at in named.items() if name not in _OPTIONAL or at in tensors}

    pending = Pending(**value("pending_", Pending))
    if f"{layout}/sketch" in tensors:  # only a layout with a filter has one
        sketch_ms = int(tensors[f"{layout}/sketch_ms"][0])
        pending = replace(pending, sketch=tensors[f"{layout}/sketch"], sketch_ms=sketch_ms)

    return LayoutDelta(
        rows=Rows(**value("", Rows)),
        removed_slots=tensors[f"{layout}/removed_slots"],
        removed_keys=tensors[f"{layout}/removed_keys"],
        defaults=Rows(**value("defaults_", Rows)),
        pending=pending,
    )


def _check_fits(name: str, part: LayoutDelta, tables: Mapping[str, Table]) -> None:
    if name not in tables:
        raise SchemaMismatch(f"segment has layout {name!r}, the tables are {sorted(tables)}: use its configuration")
    layout = tables[name].layout
    slots = set(np.unique(np.concatenate([part.rows.slots, part.defaults.slots, part.pending.slots])).tolist())
    if part.rows.values.shape[1] != layout.dim or not slots <= set(layout.slots):
        raise SchemaMismatch(
            f"segment's layout {name!r} has dim {part.rows.values.shape[1]} and slots {sorted(slots)}, the table has "
            f"dim {layout.dim} and slots {sorted(layout.slots)}: use its configuration"
        )


MAX_CHAIN = 8
"""Files before they are folded into one: half folds twice as often, double makes a restart read twice as many."""


def extend(folder: Path, chain: Sequence[SegmentFile], stem: str, delta: TablesDelta) -> list[SegmentFile]:
    """Write `delta` under a new name that begins with `stem` behind `chain`; a chain grown too long is folded into one base.

    No file is deleted. All are written twice: every later checkpoint needs them. SnapshotCorrupt when both of one are bad.
    """
    longer = [*chain, write_segment(fresh(folder, stem, ".safetensors"), delta, twice=True)]
    if len(longer) <= MAX_CHAIN:
        return longer
    base = merged(read_chain(folder, longer))
    return [write_segment(fresh(folder, f"{stem}-base", ".safetensors"), base, twice=True)]
