"""Messages of the `parameters` topic: what changed in the trainer's rows and dense weights.

One message is a safetensors buffer; its metadata names epoch, step, chunk i of n, schema and what it covers. A version is
visible with its last chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from recsys.errors import BadInput
from recsys.types import Float32, Int32, Int64

CHUNK_BYTES = 512 * 1024
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Version:
    """A delta's place in the trainer's order; a higher epoch always wins."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDelta:
    """Rows [N, D], when each was last seen, and tombstones of one layout; its shared default rows."""

    layout: str
    slots: Int32
    keys: Int64
    values: Float32
    last_seen_ms: Int64
    removed_slots: Int32
    removed_keys: Int64
    default_slots: Int32
    default_values: Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One whole version: rows of every layout, or dense weights (a safetensors buffer)."""

    version: Version
    covers_ms: int
    """Labels final up to this log time are in it."""
    schema: str
    rows: tuple[RowDelta, ...] = ()
    dense: bytes = b""
    dense_version: int = 0


_ROW_FIELDS = ("slots", "keys", "values", "last_seen_ms", "removed_slots", "removed_keys")
_DEFAULT_FIELDS = ("default_slots", "default_values")


def encode_delta(delta: Delta) -> list[bytes]:
    """The delta as chunks of at most about 512 KB, in order."""
    parts: list[Arrays] = []
    for rows in delta.rows:
        parts += _row_parts(rows)
    for start in range(0, len(delta.dense), CHUNK_BYTES):
        parts.append({"dense": np.frombuffer(delta.dense[start : start + CHUNK_BYTES], np.uint8)})
    parts = parts or [{"dense": np.zeros(0, np.uint8)}]
    head = {
        "epoch": str(delta.version.epoch),
        "step": str(delta.version.step),
        "covers_ms": str(delta.covers_ms),
        "schema": delta.schema,
        "dense_version": str(delta.dense_version),
        "chunks": str(len(parts)),
    }
    return [save(arrays, head | {"chunk": str(i)}) for i, arrays in enumerate(parts)]


def _row_parts(rows: RowDelta) -> list[Arrays]:
    per_chunk = max(1, (CHUNK_BYTES - 4096) // (32 + 4 * rows.values.shape[1]))  # a row and a tombstone each
    count = max(len(rows.keys), len(rows.removed_keys))
    parts: list[Arrays] = []
    for start in range(0, max(count, 1), per_chunk):
        stop = start + per_chunk
        part: Arrays = {
            f"{rows.layout}.{name}": np.ascontiguousarray(getattr(rows, name)[start:stop]) for name in _ROW_FIELDS
        }
        if start == 0:
            part |= {f"{rows.layout}.{name}": np.ascontiguousarray(getattr(rows, name)) for name in _DEFAULT_FIELDS}
        parts.append(part)
    return parts


def metadata(data: bytes) -> dict[str, str]:
    """The header's metadata of a safetensors buffer."""
    length = int.from_bytes(data[:8], "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    return dict(header.get("__metadata__", {}))


@dataclass(slots=True)
class DeltaReader:
    """Puts chunks together again: one whole delta comes out with its last chunk; an unfinished one is dropped when a newer begins."""

    _version: tuple[Version, int] | None = None
    _parts: list[Arrays] = field(default_factory=list)

    def feed(self, data: bytes) -> Delta | None:
        """BadInput when the message is no chunk of a delta."""
        try:
            head, arrays = metadata(data), load(data)
            version = Version(epoch=int(head["epoch"]), step=int(head["step"]))
            chunk, chunks, dense_version = int(head["chunk"]), int(head["chunks"]), int(head["dense_version"])
        except (KeyError, ValueError, SafetensorError) as error:
            raise BadInput(f"parameters message: not a delta ({error})", field="value") from None
        if chunk == 0:
            self._version, self._parts = (version, dense_version), []
        if self._version != (version, dense_version) or chunk != len(self._parts):
            return None  # The rest of a delta whose beginning is not in what we read, or a resent chunk.
        self._parts.append(arrays)
        if chunk + 1 < chunks:
            return None
        parts, self._parts = self._parts, []
        return Delta(
            version=version,
            covers_ms=int(head["covers_ms"]),
            schema=head["schema"],
            rows=_rows_of(parts),
            dense=b"".join(part["dense"].tobytes() for part in parts if "dense" in part),
            dense_version=dense_version,
        )


def _rows_of(parts: Sequence[Arrays]) -> tuple[RowDelta, ...]:
    layouts = dict.fromkeys(name.split(".")[0] for part in parts for name in part if "." in name)
    deltas = []
    for layout in layouts:
        arrays = {
            name: np.concatenate([part[f"{layout}.{name}"] for part in parts if f"{layout}.{name}" in part])
            for name in (*_ROW_FIELDS, *_DEFAULT_FIELDS)
        }
        deltas.append(RowDelta(layout=layout, **arrays))
    return tuple(deltas)
