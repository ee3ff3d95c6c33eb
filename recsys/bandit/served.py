"""What the bandit served with, as logged in an impression's `bandit`: the trainer computes nothing again.

Layout, little-endian: version u8, active clusters K u8, dimensions D u16, shown items N u16, bytes of the generation's name
u16; cluster ids int64 [K], weights float32 [K], the user's vector float32 [D], edges uint64 [N] (bit k: the item has an edge
to the k-th active cluster), the generation's name as UTF-8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.errors import BadInput
from recsys.types import Float32, Int64

MAX_ACTIVE = 64
"""Bits of an item's edges."""
MAX_NAME = 256
UInt64 = npt.NDArray[np.uint64]
_HEAD = struct.Struct("<BBHHH")
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request's active clusters [K], nearest first, their weights [K], the user's vector [D], the shown items' edges [N]."""

    generation: str
    """The retrieval generation that the vector is of."""
    clusters: Int64
    weights: Float32
    vector: Float32
    edges: UInt64

    def encode(self) -> bytes:
        """The bytes of an impression's `bandit`."""
        name = self.generation.encode()
        head = _HEAD.pack(_VERSION, len(self.clusters), len(self.vector), len(self.edges), len(name))
        arrays = (
            self.clusters.astype("<i8"),
            self.weights.astype("<f4"),
            self.vector.astype("<f4"),
            self.edges.astype("<u8"),
        )
        return b"".join((head, *(array.tobytes() for array in arrays), name))


def decode(data: bytes, num_items: int) -> Served:
    """What `encode` wrote for an answer of `num_items`. BadInput for anything else."""
    if len(data) < _HEAD.size or data[0] != _VERSION:
        raise _bad("is not of version 1")
    _, active, dim, items, length = _HEAD.unpack_from(data)
    if len(data) != _HEAD.size + 12 * active + 4 * dim + 8 * items + length:
        raise _bad(f"has {len(data)} bytes: it was cut or padded")
    if items != num_items:
        raise _bad(f"has edges of {items} items, the impression shows {num_items}")
    if not 0 < active <= MAX_ACTIVE:
        raise _bad(f"has {active} active clusters: there are 1 to {MAX_ACTIVE}")
    parts, start = [], _HEAD.size
    for kind, count in (("<i8", active), ("<f4", active), ("<f4", dim), ("<u8", items)):
        parts.append(np.frombuffer(data, kind, count, start))
        start += parts[-1].nbytes
    clusters, weights, vector, edges = parts
    if not ((weights > 0) & (weights <= 1)).all() or not np.isfinite(vector).all():
        raise _bad("has weights outside (0, 1] or a vector that is not finite")
    if len(set(clusters.tolist())) != active or (edges >> np.uint64(active - 1) >> np.uint64(1)).any():
        raise _bad("names a cluster twice, or edges to one that is not active")
    try:
        generation = data[start:].decode()
    except UnicodeDecodeError:
        raise _bad("names a generation that is not UTF-8") from None
    if not generation.isprintable() or len(generation) > MAX_NAME:
        raise _bad(f"names a generation of more than {MAX_NAME} characters, or with control characters")
    return Served(generation=generation, clusters=clusters, weights=weights, vector=vector, edges=edges)


def _bad(what: str) -> BadInput:
    return BadInput(f"bandit {what}: only the ranking service writes this field; leave it out", field="bandit")
