"""`recsys table inspect`: what a checkpoint or snapshot holds, without a running service."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from recsys import config
from recsys.errors import BadInput, SnapshotCorrupt
from recsys.features.schema import Schema
from recsys.files import unseal
from recsys.table import segments
from recsys.table.index import planned
from recsys.table.segments import LayoutDelta
from services.cli.main import DONE, emit

AGES = {"1 m": 60, "10 m": 600, "1 h": 3600, "6 h": 21_600, "1 d": 86_400, "7 d": 604_800, "30 d": 2_592_000}
"""Upper ends of the age histogram, seconds before the newest row was seen."""


def run(options: argparse.Namespace) -> int:
    """Print rows, load, bytes, rows by slot and age of each table of a snapshot."""
    path: Path = options.snapshot
    manifest_path = path / "manifest.json" if path.is_dir() else path
    if not manifest_path.is_file():
        below = (
            [p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/manifest.json")] if path.is_dir() else []
        )
        named = ", ".join(sorted(p.relative_to(path).as_posix() for p in below)[:5])
        hint = f"; below it there is {named}" if named else ""
        raise BadInput(
            f"{manifest_path} does not exist: name a folder with a manifest.json, such as DATA/trainer{hint}"
        )
    try:
        manifest = unseal(manifest_path.read_bytes())
        chain, schema = manifest["segments"], str(manifest["schema"])
        tables = segments.merged(segments.read_chain(manifest_path.parent, chain))
        file_bytes = sum(int(part["bytes"]) for part in chain)
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotCorrupt(
            f"{manifest_path} is no manifest of a checkpoint or snapshot ({error!r}): restore it"
        ) from None
    names = _slot_names(options.config, schema)
    result = {
        "snapshot": str(manifest_path.parent),
        "step": manifest.get("step"),
        "schema": schema,
        "files": len(chain),
        "file_bytes": file_bytes,
        "tables": {name: describe(part, names) for name, part in tables.items()},
    }
    emit(options, result, _text(result))
    return DONE


def _slot_names(path: Path | None, schema: str) -> tuple[str, ...]:
    """Names of slots where the configuration is the snapshot's; otherwise none, and slots keep their numbers."""
    known = Schema.of(config.load(path))
    return known.slots if known.hash == schema else ()


def describe(part: LayoutDelta, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """One table: `memory_bytes` and `load` are those of a CPU table of float32 values that holds just these rows."""
    rows = part.rows
    count, width = len(rows.keys), rows.values.shape[1] + rows.state.shape[1]
    load, index_bytes = planned(count)
    slots, counts = np.unique(rows.slots, return_counts=True)
    newest = int(rows.last_seen_ms.max(initial=0))
    older = np.searchsorted(list(AGES.values()), (newest - rows.last_seen_ms) / 1000)
    histogram = np.bincount(older, minlength=len(AGES) + 1)
    return {
        "rows": count,
        "load": round(load, 4),
        "values": rows.values.shape[1],
        "state": rows.state.shape[1],
        "memory_bytes": count * 4 * width + index_bytes,
        "slots": {
            (names[s] if s < len(names) else str(s)): int(n) for s, n in zip(slots.tolist(), counts, strict=True)
        },
        "newest_ms": newest if count else None,
        "age": dict(zip([*(f"<= {name}" for name in AGES), "older"], histogram.tolist(), strict=True)),
        "waiting_for_admission": len(part.pending.keys),
        "filter_counters": len(part.pending.sketch),
    }


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['snapshot']}: step {result['step']}, {result['files']} files, {result['file_bytes']:,} bytes"]
    for name, table in result["tables"].items():
        lines.append(
            f"\n{name}: {table['rows']:,} rows of {table['values']} + {table['state']} numbers, load {table['load']:.2f}, "
            f"{table['memory_bytes']:,} bytes in memory, {table['waiting_for_admission']:,} keys waiting"
        )
        lines += [f"  slot {slot:24}{rows:>12,}" for slot, rows in table["slots"].items()]
        lines.append("  last seen, before the newest: " + ", ".join(f"{k} {n:,}" for k, n in table["age"].items() if n))
    return "\n".join(lines)
