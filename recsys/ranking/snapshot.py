"""The counters' snapshot of one ranking process: arrays and the log positions they contain, checksummed and renamed into place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import safetensors.numpy

from recsys.errors import SnapshotCorrupt
from recsys.events.deltas import metadata
from recsys.features.schema import Schema
from recsys.files import read_file, write_file
from recsys.ranking.sources import Sources
from recsys.ranking.state_consumer import StateConsumer

NAME = "counters.safetensors"
VERSION = "4"
logger = logging.getLogger("recsys")


def save(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema) -> dict[str, int]:
    """Write the counters as of the consumer's position, and return it. Call between turns or from any thread: the lock makes it one cut."""
    folder.mkdir(parents=True, exist_ok=True)
    with sources.lock:
        positions, saved_ms = dict(consumer.counter_positions), consumer.counters.time_ms
        state = sources.state()
        size = len(sources.catalogue)
        keys, found = sources.catalogue.keys[:size, 0].copy(), sources.catalogue.found[:size].copy()
    arrays: dict[str, Any] = {
        f"{part}.{name}": np.ascontiguousarray(array)
        for part, values in state.items()
        for name, array in values.items()
    }
    arrays["keys"], arrays["found"] = keys, found
    head = {
        "version": VERSION,
        "schema": schema.hash,
        "units": _units(schema),
        "saved_ms": str(saved_ms),
        "positions": orjson.dumps(positions).decode(),
    }
    entry = write_file(folder / NAME, safetensors.numpy.save(arrays, head))
    write_file(folder / "counters.json", orjson.dumps(entry))
    return positions


def _units(schema: Schema) -> str:
    """What the counted keys and columns mean. Half-lives stand beside their sums: those are converted."""
    layout = schema.counters
    transitions = schema.transition_context if any(name.startswith("follows.") for name in schema.numbers) else None
    counters = layout.slots, layout.columns, len(layout.half_lives_s)
    return orjson.dumps([schema.context, schema.buckets, counters, transitions]).decode()


def load(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema, now_ms: int) -> bool:
    """Restore the counters into fresh sources; False, loudly, when there are none that can be used: the log is read from its beginning."""
    try:
        entry = orjson.loads((folder / "counters.json").read_bytes())
        data = read_file(folder / NAME, entry["checksum"])
        head = metadata(data)
        _check(head, schema)
        arrays = safetensors.numpy.load(data)
        rows = sources.catalogue.rows_of(arrays.pop("keys"))
        rows[~arrays.pop("found", rows == rows).astype(np.bool_)] = -1  # rows without an item have a key, too
        state: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            part, field = name.split(".", 1)
            state.setdefault(part, {})[field] = array
        sources.restore(state, rows, now_ms, int(head.get("saved_ms", 0)))
    except FileNotFoundError:
        return False
    except (SnapshotCorrupt, orjson.JSONDecodeError, KeyError, ValueError) as error:
        logger.error("counters not restored: %s; reading the log from its beginning", error)
        sources.clear()
        return False
    consumer.counter_positions |= orjson.loads(head["positions"])
    return True


def _check(head: Mapping[str, str], schema: Schema) -> None:
    """SnapshotCorrupt where what was counted means something else now."""
    before = head["version"] == "3"  # it named the whole schema, and no units
    if before and head["schema"] == schema.hash:
        logger.info("counters of an earlier version: their half-lives are taken to be those configured")
    elif before or head["version"] != VERSION or head["units"] != _units(schema):
        raise SnapshotCorrupt(
            f"{NAME} (version {head['version']}, schema {head['schema']}) counts something else than schema {schema.hash}"
        )
