"""The counters' snapshot of one ranking process: arrays and the log positions they contain, checksummed and renamed into place."""

from __future__ import annotations

import logging
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
logger = logging.getLogger("recsys")


def save(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema) -> dict[str, int]:
    """Write the counters as of the consumer's position, and return it. Call between turns or from any thread: the lock makes it one cut."""
    folder.mkdir(parents=True, exist_ok=True)
    with sources.lock:
        positions = dict(consumer.counter_positions)
        state = sources.state()
        keys = sources.catalogue.keys[: len(sources.catalogue), 0].copy()
    arrays: dict[str, Any] = {
        f"{part}.{name}": np.ascontiguousarray(array)
        for part, values in state.items()
        for name, array in values.items()
    }
    arrays["keys"] = keys
    head = {"version": "3", "schema": schema.hash, "positions": orjson.dumps(positions).decode()}
    entry = write_file(folder / NAME, safetensors.numpy.save(arrays, head))
    write_file(folder / "counters.json", orjson.dumps(entry))
    return positions


def load(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema, now_ms: int) -> bool:
    """Restore the counters; False, loudly, when there are none that can be used: then the log is read from its beginning."""
    try:
        entry = orjson.loads((folder / "counters.json").read_bytes())
        data = read_file(folder / NAME, entry["checksum"])
        head = metadata(data)
        if head["schema"] != schema.hash or head["version"] != "3":
            raise SnapshotCorrupt(f"{folder / NAME} has schema {head['schema']}, version {head['version']}")
        arrays = safetensors.numpy.load(data)
    except FileNotFoundError:
        return False
    except (SnapshotCorrupt, orjson.JSONDecodeError, KeyError) as error:
        logger.error("counters not restored: %s; reading the log from its beginning", error)
        return False
    rows = sources.catalogue.rows_of(arrays.pop("keys"))
    state: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        part, field = name.split(".", 1)
        state.setdefault(part, {})[field] = array
    sources.restore(state, rows, now_ms)
    consumer.counter_positions |= orjson.loads(head["positions"])
    return True
