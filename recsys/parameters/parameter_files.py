"""Snapshots of the serving copy: values, dense weights, and the position in topic `parameters` to go on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.files import KeptManifests, Manifests, fresh, read_file, write_file
from recsys.model.layouts import same_parameters
from recsys.parameters.base import ParameterState
from recsys.parameters.deltas import Version
from recsys.parameters.store import Counted, ParameterStore
from recsys.table import segments
from recsys.table.base import Rows
from recsys.table.segments import SegmentFile, TablesDelta

CURSOR = "snapshot"
logger = logging.getLogger("recsys")


class Place(NamedTuple):
    """Where to go on reading, and which log that is of ("": not known)."""

    position: int
    log: str = ""


class Snapshots:
    """Snapshots of one store in a folder: the newest, and the one before it. Not beside `apply`."""

    def __init__(self, folder: Path, schema: str) -> None:
        self._folder, self._schema = folder, schema
        self._manifests = Manifests(folder)
        self._chain: list[SegmentFile] = []
        self._last: Place | None = None
        self.kept: Place | None = None
        """Of the older one of the two on disk: the log must keep what comes after it."""

        self.left: Place | None = None
        """Where a snapshot of another configuration stood, if that is the newest."""

    def save(self, store: ParameterStore, place: Place) -> None:
        """Write one. OSError, SnapshotCorrupt: then the one before stays, and the next is tried from all rows."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows, versions = segments.take(store.tables, CURSOR)
        state = store.state
        stem = f"snapshot-{state.version.epoch:08d}-{state.version.step:012d}"
        try:
            chain = segments.extend(self._folder, self._chain, stem, rows)
        except SnapshotCorrupt:
            self.begin_anew(store)
            raise
        dense = write_file(fresh(self._folder, stem, ".dense"), store.dense()[1])
        self._manifests.write(
            {
                "version": 1,
                "schema": self._schema,
                "position": place.position,
                "log": place.log,
                "epoch": state.version.epoch,
                "step": state.version.step,
                "covers_ms": state.covers_ms,
                "dense_version": state.dense_version,
                "counted": asdict(store.counted),
                "segments": chain,
                "dense": dense,
            }
        )
        self._chain = chain
        self.kept, self._last = self._last or place, place
        segments.acknowledge(store.tables, CURSOR, versions)
        self._manifests.sweep("snapshot-*")

    def begin_anew(self, store: ParameterStore) -> None:
        """The next snapshot holds every row: what is on disk is not what the store came from."""
        self._chain = []
        for table in store.tables.values():
            table.release(CURSOR)

    def load(self, store: ParameterStore) -> Place | None:
        """Load the newest one whose files are whole into an empty store; where it says to go on, None when there is none.

        What cannot be used is said. SchemaMismatch when it was written with another configuration.
        """
        for manifest in self._manifests.read():
            try:
                place = self._load(store, manifest)
            except SnapshotCorrupt as error:
                logger.error("snapshot not used: %s", error)
                continue
            self._last = self.kept = place
            return place
        return None

    def _load(self, store: ParameterStore, manifest: Mapping[str, Any]) -> Place:
        try:
            schema = manifest["schema"]
            state = ParameterState(
                version=Version(epoch=manifest["epoch"], step=manifest["step"]),
                covers_ms=manifest["covers_ms"],
                dense_version=manifest["dense_version"],
            )
            place = Place(int(manifest["position"]), manifest.get("log", ""))
            chain, dense = manifest["segments"], manifest["dense"]
            if not same_parameters(schema, self._schema):
                self._last = self.kept = self.left = place
                store.restore(replace(state, dense_version=0), b"")  # by its version others are believed
                raise SchemaMismatch(
                    f"{self._manifests.newest} was written with schema {schema}, the configuration makes {self._schema}: rows "
                    "come from the trainer, once it has carried its own over"
                )
            weights = read_file(self._folder / dense["name"], dense["checksum"])
            deltas = segments.read_chain(self._folder, chain)
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotCorrupt(f"{self._manifests.newest} is no manifest of a snapshot ({error})") from None
        segments.resume(store.tables, deltas, CURSOR)
        self._chain = chain
        store.restore(state, weights)
        store.counted = Counted(**manifest.get("counted", {"epoch": state.version.epoch}))
        return place


def load_checkpoint(store: ParameterStore, folder: Path, schema: str) -> int | None:
    """Rows and weights of the trainer's newest checkpoint into a store; its step, None when there is none of this schema.

    For when deltas are missing: what the log still has is applied after it, whatever version the store had.
    """
    for manifest in KeptManifests(folder).every():
        if not manifest.get("good", True):
            continue  # it was held back
        try:
            if not same_parameters(manifest.get("parameters", manifest["schema"]), schema):
                return None
            dense = load_arrays(read_file(folder / manifest["dense"]["name"], manifest["dense"]["checksum"]))
            deltas = [_without_state(delta) for delta in segments.read_chain(folder, manifest["segments"])]
            step = int(manifest["step"])
        except (KeyError, TypeError, ValueError, SafetensorError, SnapshotCorrupt) as error:
            logger.error("the trainer's checkpoint in %s is not used: %s", folder, error)
            continue
        weights = {name: array for name, array in dense.items() if ".model." in name}
        store.replace_all(deltas, save_arrays(weights), step)
        return step
    return None


def _without_state(delta: TablesDelta) -> TablesDelta:
    """Serving has no use for what the optimiser knows."""

    def bare(rows: Rows) -> Rows:
        return replace(rows, state=np.zeros((len(rows.keys), 0), np.float32))

    return {name: replace(part, rows=bare(part.rows), defaults=bare(part.defaults)) for name, part in delta.items()}
