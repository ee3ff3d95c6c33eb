"""The catalogue's file of one ranking process: columns as they lie in memory, and the log positions from which to go on.

Written beside the catalogue's writer: the positions are older than the columns, and what came after them is applied again.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.candidates.sources import Sources
from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.features.schema import Schema
from recsys.files import Manifests, forget_cached, fresh, replace, sync

VERSION = 2
"""Raised with what is kept of an item: a file of an older version is not used, and the topic, which is compacted, is read anew."""
OLDEST_MS = 12 * 3_600_000
"""A file that is behind the log and older is not used: the broker may have dropped deletions that came since (Kafka: after a day)."""
_PIECE = 4 * 2**20
logger = logging.getLogger("recsys")


def save(
    folder: Path, sources: Sources, schema: Schema, positions: Mapping[int, int], logs: Mapping[str, str], now_ms: int
) -> None:
    """Write the columns; `positions`, of partitions of `item`, were read before. Durable and complete, or not there.

    `logs`: which log each position belongs to, by "topic/partition"."""
    folder.mkdir(parents=True, exist_ok=True)
    path = fresh(folder, f"catalogue-{now_ms}", ".columns")
    temporary = path.with_name(path.name + ".tmp")
    arrays = []
    with temporary.open("wb") as file:
        for name, array in sources.catalogue.state().items():
            whole: Any = np.ascontiguousarray(array)
            data = memoryview(whole).cast("B") if array.size else memoryview(b"")
            checksum = 0
            for start in range(0, len(data), _PIECE):
                checksum = zlib.crc32(data[start : start + _PIECE], checksum)
                file.write(data[start : start + _PIECE])
            entry = {"name": name, "dtype": array.dtype.str, "shape": array.shape, "checksum": checksum}
            arrays.append(entry)
    sync(temporary)
    _read_back(temporary, arrays)
    replace(temporary, path)
    manifests = Manifests(folder, "catalogue")
    manifests.write(
        {
            "version": VERSION,
            "schema": schema.hash,
            "positions": {str(partition): offset for partition, offset in positions.items()},
            "logs": dict(logs),
            "written_ms": now_ms,
            "name": path.name,
            "arrays": arrays,
        }
    )
    manifests.sweep("catalogue-*.columns*")


def _read_back(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """OSError unless the disk gives back what was written."""
    with path.open("rb") as file:
        forget_cached(file.fileno())
        for entry in entries:
            left, checksum = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize, 0
            while left and (data := file.read(min(left, _PIECE))):
                left, checksum = left - len(data), zlib.crc32(data, checksum)
            if left or checksum != entry["checksum"]:
                raise OSError(errno.EIO, f"{entry['name']} was read back otherwise than it was written", str(path))


def saved_positions(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """The file's positions and the logs they belong to, by "topic/partition"; empty when there is no file to be read."""
    for manifest in Manifests(folder, "catalogue").look():
        try:
            saved = {f"item/{partition}": int(offset) for partition, offset in manifest["positions"].items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            continue  # `load` says what is wrong with it
        return saved, manifest.get("logs", {})
    return {}, {}


def load(
    folder: Path, sources: Sources, schema: Schema, bounds: Mapping[int, tuple[int, int]], now_ms: int
) -> dict[int, int] | None:
    """Restore an empty catalogue and what is filed by its attributes; returns the positions to go on from.

    None, loudly when there was a file, when it cannot be used: then the log is read from its beginning. `bounds`: the log's
    first and next offset by partition.
    """
    for manifest in Manifests(folder, "catalogue").read():
        try:
            positions = {int(partition): offset for partition, offset in manifest["positions"].items()}
            _check(manifest, positions, schema, bounds, now_ms)
            # An earlier release said `file`.
            arrays = _read(folder / (manifest["name"] if "name" in manifest else manifest["file"]), manifest["arrays"])
        except SchemaMismatch as error:
            logger.error("catalogue not restored: %s; reading the log from its beginning", error)
            return None
        except (SnapshotCorrupt, OSError, KeyError, ValueError, TypeError) as error:
            logger.error("catalogue not restored: %s", error)
            continue
        sources.restore_catalogue(arrays)
        return positions
    return None


def _check(
    manifest: Mapping[str, Any],
    positions: Mapping[int, int],
    schema: Schema,
    bounds: Mapping[int, tuple[int, int]],
    now_ms: int,
) -> None:
    """SchemaMismatch where the file is whole, and of no use: the one before it will not be either."""
    if manifest["version"] != VERSION or manifest["schema"] != schema.hash:
        raise SchemaMismatch(f"written with version {manifest['version']}, schema {manifest['schema']}")
    if positions.keys() != bounds.keys():
        raise SchemaMismatch(f"written with {len(positions)} partitions of item, there are {len(bounds)}")
    behind = any(positions[partition] < end for partition, (_, end) in bounds.items())
    if behind and now_ms - manifest["written_ms"] > OLDEST_MS:
        raise SchemaMismatch(f"written {(now_ms - manifest['written_ms']) / 3_600_000:.0f} h ago")
    for partition, (begin, end) in bounds.items():
        if not begin <= positions[partition] <= end:
            raise SchemaMismatch(f"position {positions[partition]} of item/{partition} is outside {begin}..{end}")


def _read(path: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    arrays = {}
    with path.open("rb") as file:
        for entry in entries:
            array: Any = np.zeros(entry["shape"], np.dtype(entry["dtype"]))
            data = memoryview(array).cast("B") if array.size else memoryview(bytearray())
            if file.readinto(data) != len(data) or zlib.crc32(data) != entry["checksum"]:
                raise SnapshotCorrupt(f"{str(path)!r} is torn or flipped in {entry['name']}")
            arrays[entry["name"]] = array
        if file.tell() != os.fstat(file.fileno()).st_size:
            raise SnapshotCorrupt(f"{str(path)!r} is longer than it was written")
    return arrays
