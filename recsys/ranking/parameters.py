"""The serving copy of the trainer's parameters: the seam that ranking looks rows up through, and the store behind it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.events.deltas import Delta, Version
from recsys.files import read_file, write_file
from recsys.model.plan import Block
from recsys.table import segments
from recsys.table.base import Layout, Rows
from recsys.table.tables import Implementation, Tables
from recsys.types import Float32, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """What a reply contains: the newest delta's version, what it covers, and the newest dense weights (0: none yet)."""

    version: Version = Version()
    covers_ms: int = 0
    dense_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Rows [N, D] of each block asked for, in order."""

    values: tuple[Float32, ...]
    state: ParameterState


class Parameters(Protocol):
    """Where ranking gets parameters from. Thread-safe. Raises ParametersUnavailable when they cannot be had in time."""

    def lookup(self, blocks: Sequence[Block]) -> Reply: ...

    def dense(self) -> tuple[int, bytes]:
        """The newest dense weights: (dense_version, safetensors buffer); (0, b"") before the first."""
        ...


CURSOR = "snapshot"


class ParameterStore:
    """Tables, dense weights and version, kept up to date by deltas in order. One writer; lookups from any thread."""

    def __init__(self, layouts: Sequence[Layout], schema: str, implementation: Implementation = "cpu") -> None:
        self.tables = Tables(layouts, implementation)
        self._schema = schema
        self.state = ParameterState()
        self._dense = b""
        self._chain: list[segments.SegmentFile] = []
        self._lock = threading.Lock()
        self._whole = threading.Lock()
        self._changes = 0
        """Odd while a delta is being applied."""
        self.missing = 0
        self.found = 0

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        """Rows of exactly the version that the reply names: look again when a delta came in between, then wait for it."""
        before = self._changes
        if not before % 2:
            reply = self._look(blocks)
            if self._changes == before:
                return reply
        with self._whole:
            return self._look(blocks)

    def _look(self, blocks: Sequence[Block]) -> Reply:
        state = self.state
        values = []
        for block in blocks:
            rows, found = self.tables[block.layout].lookup(block.slots, block.keys)
            hits = int(found.sum())
            self.found += hits
            self.missing += len(found) - hits
            values.append(rows)
        return Reply(values=tuple(values), state=state)

    def dense(self) -> tuple[int, bytes]:
        with self._lock:
            return self.state.dense_version, self._dense

    def apply(self, delta: Delta) -> bool:
        """Apply one whole delta; False when it is of an older epoch or step and was ignored. Raises SchemaMismatch."""
        if delta.schema != self._schema:
            raise SchemaMismatch(
                f"delta {delta.version} has schema {delta.schema}, this service {self._schema}: restart all processes with one configuration"
            )
        if delta.version < self.state.version:
            return False
        with self._whole:
            self._changes += 1
            try:
                self._apply(delta)
            finally:
                self._changes += 1
        return True

    def _apply(self, delta: Delta) -> None:
        for rows in delta.rows:
            table = self.tables[rows.layout]
            if len(rows.removed_keys):
                table.remove(rows.removed_slots, rows.removed_keys)
            if len(rows.keys):
                none = np.zeros((len(rows.keys), 0), np.float32)
                table.restore(
                    Rows(
                        slots=rows.slots,
                        keys=rows.keys,
                        values=rows.values,
                        state=none,
                        last_seen_ms=rows.last_seen_ms,
                    )
                )
            if len(rows.default_slots):
                table.restore_defaults(_defaults(rows.default_slots, rows.default_values))
        with self._lock:
            if delta.dense_version:
                self._dense = delta.dense
            self.state = ParameterState(
                version=delta.version,
                covers_ms=max(delta.covers_ms, self.state.covers_ms),
                dense_version=delta.dense_version or self.state.dense_version,
            )

    def save(self, folder: Path, position: int) -> None:
        """Snapshot values, dense weights and the position in `parameters`: written aside, fsync'd, renamed. Not beside `apply`."""
        folder.mkdir(parents=True, exist_ok=True)
        rows, versions = segments.take(self.tables, CURSOR)
        state = self.state
        stem = f"snapshot-{state.version.epoch:08d}-{state.version.step:012d}-{position:012d}"
        chain = segments.extend(folder, self._chain, stem, rows)
        dense = write_file(folder / f"{stem}.dense", self._dense)
        manifest = {
            "version": 1,
            "schema": self._schema,
            "position": position,
            "epoch": state.version.epoch,
            "step": state.version.step,
            "covers_ms": state.covers_ms,
            "dense_version": state.dense_version,
            "segments": chain,
            "dense": dense,
        }
        write_file(folder / "manifest.json", orjson.dumps(manifest))
        self._chain = chain
        segments.acknowledge(self.tables, CURSOR, versions)
        kept = {s["name"] for s in chain} | {dense["name"]}
        for path in folder.glob("snapshot-*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def load(self, folder: Path) -> int | None:
        """Load the snapshot; returns its position, None when there is none. Raises SnapshotCorrupt, SchemaMismatch."""
        path = folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = orjson.loads(path.read_bytes())
            schema, position = manifest["schema"], int(manifest["position"])
        except (orjson.JSONDecodeError, KeyError, ValueError):
            raise SnapshotCorrupt(
                f"{path} is not a snapshot manifest: delete it, the service then reads the log from its start"
            ) from None
        if schema != self._schema:
            raise SchemaMismatch(
                f"{path} was written with schema {schema}, the configuration makes {self._schema}: choose another data_dir"
            )
        loaded = segments.read_chain(folder, manifest["segments"])
        dense = read_file(folder / manifest["dense"]["name"], manifest["dense"]["checksum"])
        segments.load(self.tables, loaded)
        segments.skip(self.tables, CURSOR)
        self._chain = manifest["segments"]
        self._dense = dense
        self.state = ParameterState(
            version=Version(epoch=manifest["epoch"], step=manifest["step"]),
            covers_ms=manifest["covers_ms"],
            dense_version=manifest["dense_version"],
        )
        return position


def _defaults(slots: Int32, values: Float32) -> Rows:
    size = len(slots)
    return Rows(
        slots=slots,
        keys=np.zeros(size, np.int64),
        values=values,
        state=np.zeros((size, 0), np.float32),
        last_seen_ms=np.zeros(size, np.int64),
    )
