"""The counters' snapshot of one ranking process: arrays and the log positions they contain, checksummed and renamed into place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import safetensors.numpy

from recsys.candidates.count_units import converted, units
from recsys.candidates.sources import Sources
from recsys.candidates.state_consumer import StateConsumer
from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.features.schema import Schema
from recsys.files import Manifests, fresh, read_file, write_file
from recsys.parameters.deltas import metadata

NAME = "counters"
VERSION = "4"
logger = logging.getLogger("recsys")


def save(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema) -> dict[str, int]:
    """Write the counters as of the consumer's position; returns where the snapshot before it stands: the log must keep what is after.

    Call between turns or from any thread: nothing changes meanwhile, and requests go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with sources.writing:
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
        "units": units(schema),
        "saved_ms": str(saved_ms),
        "positions": orjson.dumps(positions).decode(),
        "logs": orjson.dumps(consumer.counter_logs).decode(),
    }
    entry = write_file(fresh(folder, "counters", ".safetensors"), safetensors.numpy.save(arrays, head))
    manifests = Manifests(folder, NAME)
    manifests.write({**entry, "positions": positions})
    manifests.sweep("counters*.safetensors*")
    return next((older["positions"] for older in list(manifests.look())[1:] if "positions" in older), positions)


def load(folder: Path, sources: Sources, consumer: StateConsumer, schema: Schema, now_ms: int) -> bool:
    """Restore the counters into fresh sources; False, loudly, when there are none that can be used: the log is read from its beginning."""
    for entry in Manifests(folder, NAME).read():
        try:
            data = read_file(folder / entry["name"], entry["checksum"])
            head = metadata(data)
            _check(head, schema)
            _restore(data, head, sources, schema, now_ms)
        except SchemaMismatch as error:
            logger.error("counters not restored: %s; reading the log from its beginning", error)
            return False
        except (SnapshotCorrupt, LookupError, TypeError, ValueError) as error:
            logger.error("counters not restored: %s", error)
            sources.clear()
            continue
        consumer.counter_positions |= orjson.loads(head["positions"])
        consumer.counter_logs = orjson.loads(head.get("logs", "{}"))
        return True
    return False


def _restore(data: bytes, head: Mapping[str, str], sources: Sources, schema: Schema, now_ms: int) -> None:
    arrays = safetensors.numpy.load(data)
    rows = sources.catalogue.rows_of(arrays.pop("keys"))
    rows[~arrays.pop("found", rows == rows).astype(np.bool_)] = -1  # rows without an item have a key, too
    state: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        part, field = name.split(".", 1)
        state.setdefault(part, {})[field] = array
    state = converted(state, head["units"], schema) if "units" in head else state
    sources.restore(state, rows, now_ms, int(head.get("saved_ms", 0)))


def _check(head: Mapping[str, str], schema: Schema) -> None:
    """SchemaMismatch where what was counted means something else now."""
    before = head["version"] == "3"  # it named the whole schema, and no units
    if before and head["schema"] == schema.hash:
        logger.info("counters of an earlier version: their half-lives are taken to be those configured")
    elif before or head["version"] != VERSION:
        raise SchemaMismatch(
            f"{NAME} (version {head['version']}, schema {head['schema']}) counts something else than schema {schema.hash}"
        )
