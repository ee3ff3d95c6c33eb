"""Messages of the `parameters` topic: what changed in the trainer's rows and dense weights.

One message is a safetensors buffer; its metadata names epoch, step, chunk i of n, schema and what it covers. A version is
visible with its last chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from safetensors import SafetensorError
from safetensors.numpy import load, save

from recsys.errors import BadInput
from recsys.types import Float32, Int32, Int64

CHUNK_BYTES = 512 * 1024
MAX_CHUNKS = 1_000_000
MAX_LEAD = 1_000_000
"""An epoch may lead the newest one believed by so many: a trainer that starts every second makes as many in eleven days."""
MAX_STEP_LEAD = 10_000_000
"""A step likewise: a trainer makes as many in a week."""
DELTA_BYTES = 32 * 2**20
"""Rows of more than this travel as several deltas of one version, each of which is applied by itself: half makes a restart's first
publish more of them, double has every reader hold as much more."""
UNFINISHED_BYTES = 256 * 2**20
"""Of chunks whose delta is not whole: a delta of rows eight times over, and more than the dense weights of any configuration here."""
MAX_UNFINISHED = 4
"""Deltas of which only some chunks were read: a trainer begins one after the other, two of them amid a restart."""
STALE_RECORDS = 100_000
"""What is unfinished after so many more records is given up."""
_CHUNK_OVERHEAD = 4096
"""Bytes of memory that a chunk takes beside its arrays."""
_END_OF_TIME_MS = 2**43
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
    number: int = 0
    """Deltas of one epoch are counted from 1, so that one that is missing is found; 0: written before they were."""
    whole: str = ""
    """`begin` and `end` of a state that is published whole: rows of before that do not come in between are gone."""


WHOLE_BEGIN, WHOLE_END = "begin", "end"
_ROW_FIELDS = ("slots", "keys", "values", "last_seen_ms", "removed_slots", "removed_keys")
_DEFAULT_FIELDS = ("default_slots", "default_values")
_KINDS = {
    "slots": ("I32", 1),
    "keys": ("I64", 1),
    "values": ("F32", 2),
    "last_seen_ms": ("I64", 1),
    "removed_slots": ("I32", 1),
    "removed_keys": ("I64", 1),
    "default_slots": ("I32", 1),
    "default_values": ("F32", 2),
    "dense": ("U8", 1),
}
"""Type and dimensions of each field in a message."""


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
        "number": str(delta.number),
        "chunks": str(len(parts)),
    } | ({"whole": delta.whole} if delta.whole else {})
    return [save(arrays, head | {"chunk": str(i)}) for i, arrays in enumerate(parts)]


def pieces(rows: Sequence[RowDelta], limit: int = DELTA_BYTES) -> Iterator[tuple[RowDelta, ...]]:
    """The same rows as deltas of at most about `limit` bytes each."""
    if sum(max(len(r.keys), len(r.removed_keys)) * _row_bytes(r) for r in rows) <= limit:
        yield tuple(rows)
        return
    for each in rows:
        step = max(1, limit // _row_bytes(each))
        for start in range(0, max(len(each.keys), len(each.removed_keys)), step):
            part = slice(start, start + step)
            more = {} if start == 0 else {name: getattr(each, name)[:0] for name in _DEFAULT_FIELDS}
            yield (replace(each, **{name: getattr(each, name)[part] for name in _ROW_FIELDS}, **more),)


def _row_bytes(rows: RowDelta) -> int:
    return 32 + 4 * rows.values.shape[1]  # a row and a tombstone each


def _row_parts(rows: RowDelta) -> list[Arrays]:
    per_chunk = max(1, (CHUNK_BYTES - 4096) // _row_bytes(rows))
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


def not_finite(weights: bytes) -> str:
    """Name of the first array of a safetensors buffer that holds something else than numbers; empty: none."""
    return next((name for name, array in load(weights).items() if not np.isfinite(array).all()), "")


def metadata(data: bytes) -> dict[str, str]:
    """The header's metadata of a safetensors buffer. ValueError when there is none."""
    return _header(data)[1]


def _header(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """What the header says of each tensor, and its metadata."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("cut short")
    header = orjson.loads(data[8 : 8 + length])
    said = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("no safetensors header")
    return header, said


@dataclass(frozen=True, slots=True)
class _Head:
    """What every chunk of one delta says alike."""

    version: Version
    dense_version: int
    covers_ms: int
    schema: str
    chunks: int
    number: int
    whole: str


def _head(said: Mapping[str, str]) -> tuple[_Head, int]:
    """The head and which chunk this is. ValueError, KeyError."""
    number = {
        name: _number(name, said[name]) for name in ("epoch", "step", "dense_version", "covers_ms", "chunks", "chunk")
    }
    counted = _number("number", said.get("number", "0"))
    if not number["chunk"] < number["chunks"] <= MAX_CHUNKS:
        raise ValueError(f"chunk {number['chunk']} of {number['chunks']}")
    whole = said.get("whole", "")
    if whole not in ("", WHOLE_BEGIN, WHOLE_END):
        raise ValueError(f"whole is {whole[:40]!r}")
    version = Version(epoch=number["epoch"], step=number["step"])
    head = _Head(
        version, number["dense_version"], number["covers_ms"], said["schema"], number["chunks"], counted, whole
    )
    return head, number["chunk"]


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{name} is {text[:40]!r}")
    return int(text)


def version_of(data: bytes) -> Version:
    """The version that a message names, without its rows. BadInput when it is no chunk of a delta."""
    return numbered(data).version


class Numbered(NamedTuple):
    """Which delta a message is of, and which of its chunks it is."""

    version: Version
    number: int
    chunk: int
    chunks: int


def numbered(data: bytes) -> Numbered:
    """What a message says of itself, without its rows. BadInput when it is no chunk of a delta."""
    try:
        head, chunk = _head(metadata(data))
    except (KeyError, ValueError) as error:
        raise BadInput(f"parameters message: not a delta ({error})", field="value") from None
    return Numbered(head.version, head.number, chunk, head.chunks)


def believable(version: Version, last: Version) -> bool:
    """Whether a version may follow `last`, the newest one believed: one that is far ahead would outrank all that follow, for ever.

    After nothing (`Version()`) any step of a small epoch may come: a log does not begin with a trainer's first.
    """
    far = version.step - last.step > MAX_STEP_LEAD and last != Version()
    return version.epoch - last.epoch <= MAX_LEAD and not far


def _arrays(data: bytes) -> tuple[_Head, int, Arrays]:
    """One chunk, every field of it checked. BadInput says what is wrong with it."""
    try:
        tensors, said = _header(data)
        head, chunk = _head(said)
        for name, tensor in tensors.items():
            kind, dimensions = _KINDS[name.rpartition(".")[2]]
            if tensor["dtype"] != kind or len(tensor["shape"]) != dimensions:
                raise ValueError(f"{name[:80]} is {tensor['dtype']} {tensor['shape']}")
        arrays = load(data)
        for layout in _layouts([arrays]):
            _check_rows(layout, arrays)
    except KeyError as error:
        raise BadInput(f"parameters message: not a delta (field {error})", field="value") from None
    except (ValueError, TypeError, OverflowError, SafetensorError) as error:
        raise BadInput(f"parameters message: not a delta ({error})", field="value") from None
    return head, chunk, arrays


def _check_rows(layout: str, arrays: Arrays) -> None:
    """ValueError, KeyError unless one layout's arrays agree and hold numbers."""
    rows = {name: arrays[f"{layout}.{name}"] for name in _ROW_FIELDS}
    groups = (
        [rows["slots"], rows["keys"], rows["values"], rows["last_seen_ms"]],
        [rows["removed_slots"], rows["removed_keys"]],
    )
    defaults = [arrays[name] for field in _DEFAULT_FIELDS if (name := f"{layout}.{field}") in arrays]
    for group in (*groups, defaults):
        if len({len(array) for array in group}) > 1:
            raise ValueError(f"{layout[:80]}: arrays of {[len(array) for array in group]} rows")
    if len(defaults) == 1 or (defaults and defaults[1].shape[1] != rows["values"].shape[1]):
        raise ValueError(f"{layout[:80]}: default rows do not fit the others")
    if not all(np.isfinite(values).all() for values in (rows["values"], *defaults[1:])):
        raise ValueError(f"{layout[:80]}: a value is not finite")
    seen = rows["last_seen_ms"]
    if len(seen) and not (int(seen.min()) >= 0 and int(seen.max()) < _END_OF_TIME_MS):
        raise ValueError(f"{layout[:80]}: last seen between {seen.min()} and {seen.max()}")


@dataclass(slots=True)
class _Unfinished:
    head: _Head
    offset: int
    """Of its first chunk."""
    parts: list[Arrays] = field(default_factory=list)
    size: int = 0


class DeltaReader:
    """Puts chunks together again: one whole delta comes out with its last chunk.

    Some unfinished ones are kept beside each other, so that a stray chunk ends no other delta; together at most `max_bytes`.
    """

    def __init__(self, max_bytes: int = UNFINISHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._unfinished: dict[tuple[Version, int], _Unfinished] = {}

    def begins(self) -> int | None:
        """Where the oldest unfinished delta begins; None when there is none."""
        return min((one.offset for one in self._unfinished.values()), default=None)

    def feed(self, data: bytes, offset: int = 0) -> Delta | None:
        """BadInput when the message is no chunk of a delta, or not of the one that it says it is of."""
        head, chunk, arrays = _arrays(data)
        for key in [k for k, one in self._unfinished.items() if offset - one.offset > STALE_RECORDS]:
            del self._unfinished[key]  # its trainer died amid it
        key = head.version, head.dense_version
        if chunk == 0:
            self._unfinished.pop(key, None)
            self._unfinished[key] = _Unfinished(head, offset)
        one = self._unfinished.get(key)
        if one is None or chunk != len(one.parts):
            return None  # The rest of a delta whose beginning is not in what we read, or a resent chunk.
        if one.head != head:
            raise BadInput(
                f"parameters message: chunk {chunk} of {key[0]} is not of the delta that began", field="value"
            )
        one.parts.append(arrays)
        one.size += len(data) + _CHUNK_OVERHEAD
        self._make_room(key)
        if key not in self._unfinished:
            raise BadInput(f"parameters message: {key[0]} is larger than {self._max_bytes} bytes", field="value")
        if chunk + 1 < head.chunks:
            return None
        del self._unfinished[key]
        return _whole(head, one.parts)

    def _make_room(self, newest: tuple[Version, int]) -> None:
        """Let go of the oldest unfinished ones, of this one last."""
        while (
            len(self._unfinished) > MAX_UNFINISHED or sum(o.size for o in self._unfinished.values()) > self._max_bytes
        ):
            del self._unfinished[next((key for key in self._unfinished if key != newest), newest)]


def _whole(head: _Head, parts: Sequence[Arrays]) -> Delta:
    return Delta(
        version=head.version,
        covers_ms=head.covers_ms,
        schema=head.schema,
        rows=_rows_of(parts),
        dense=b"".join(part["dense"].tobytes() for part in parts if "dense" in part),
        dense_version=head.dense_version,
        number=head.number,
        whole=head.whole,
    )


def _layouts(parts: Sequence[Arrays]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for part in parts for name in part if "." in name))


def _rows_of(parts: Sequence[Arrays]) -> tuple[RowDelta, ...]:
    deltas = []
    for layout in _layouts(parts):
        found = {name: [part[f"{layout}.{name}"] for part in parts if f"{layout}.{name}" in part] for name in _KINDS}
        widths = {values.shape[1] for values in found["values"]}
        if len(widths) > 1:
            raise BadInput(f"parameters message: rows of {layout[:80]} are {sorted(widths)} wide", field="value")
        none = {"default_slots": np.zeros(0, np.int32), "default_values": np.zeros((0, widths.pop()), np.float32)}
        arrays = {
            name: np.concatenate(found[name]) if found[name] else none[name]
            for name in (*_ROW_FIELDS, *_DEFAULT_FIELDS)
        }
        deltas.append(RowDelta(layout=layout, **arrays))
    return tuple(deltas)
