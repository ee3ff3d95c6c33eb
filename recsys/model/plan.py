"""From features to rows: which rows a batch looks up, and where each of them goes.

Legend: R requests, M items in all, U unique (slot, key) pairs, T history entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.features.build import Features
from recsys.features.schema import Schema
from recsys.model import gather
from recsys.types import Bool, Int32, Int64, UInt8

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Unique rows of one layout to look up [U]."""

    layout: str
    slots: Int32
    keys: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rows to look up and, for every column, which of them it takes; U (one past the end) stands for a missing value."""

    deep: Block
    wide: Block
    shared: Index
    history: Index
    history_masks: Bool
    """[S, R, T]: the entries of each sequence"""
    history_gaps: UInt8
    """[R, T]"""
    item: Index
    crosses: Index
    request: Int64
    numbers: npt.NDArray[np.float32]

    def keep(self, items: Index) -> Plan:
        """The same with only these of its M items; the rows to look up stay."""
        return replace(
            self,
            item=self.item[items],
            crosses=self.crosses[items],
            request=self.request[items],
            numbers=self.numbers[items],
        )


def unique_rows(parts: Sequence[tuple[Int32, Int64, Bool]], layout: str) -> tuple[Block, list[Index]]:
    """Unique (slot, key) pairs of several column blocks, each (slots [C], keys [..., C], mask [..., C]).

    In order of first occurrence; for each block, which of them each column takes [..., C]; U stands for a masked one.
    """
    sizes = [keys.size for _, keys, _ in parts]
    slots, start = np.empty(sum(sizes), np.int32), 0
    for (of, keys, _), size in zip(parts, sizes, strict=True):
        slots[start : start + size].reshape(keys.shape)[...] = of
        start += size
    keys = np.concatenate([keys.ravel() for _, keys, _ in parts])
    mask = np.concatenate([mask.ravel() for _, _, mask in parts])
    first, places = (_unique if gather.compiled.is_set() else _unique_slowly)(slots, keys, mask)
    blocks, start = [], 0
    for (_, each, _), size in zip(parts, sizes, strict=True):
        blocks.append(places[start : start + size].reshape(each.shape))
        start += size
    return Block(layout=layout, slots=slots[first], keys=keys[first]), blocks


def _unique(slots: Int32, keys: Int64, mask: Bool) -> tuple[Index, Index]:
    """Where each distinct pair was first seen [U], and which of them each position has [n] (U: masked)."""
    heads = np.full(1 << max(1, 2 * len(keys) - 1).bit_length(), -1)
    first, places = np.empty(len(keys), np.intp), np.empty(len(keys), np.intp)
    count = gather.unique(slots, keys, mask, heads, first, places)
    return first[:count], places


def _unique_slowly(slots: Int32, keys: Int64, mask: Bool) -> tuple[Index, Index]:
    """The same while the kernel is not compiled yet."""
    pairs = np.rec.fromarrays([slots[mask], keys[mask]])
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    places = np.full(len(keys), len(order), np.intp)
    places[mask] = rank[inverse]
    return np.flatnonzero(mask)[first[order]], places


def plan(schema: Schema, batch: Sequence[Features]) -> Plan:
    """Lay out several requests' features as one batch; histories are padded to the longest."""
    users = [f.user for f in batch]
    lengths = np.array([len(user.history_keys) for user in users])
    present = np.arange(max(1, lengths.max())) < lengths[:, None]

    def padded(name: str, kind: type[np.generic], *width: int) -> npt.NDArray[Any]:
        out = np.zeros((*present.shape, *width), kind)
        out[present] = np.concatenate([getattr(user, name) for user in users])
        return out

    def stacked(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(user, name) for user in users]).reshape(len(users), len(schema.shared_slots))

    width = len(schema.history_slots)
    history_mask, kinds = padded("history_mask", np.bool_, width), padded("history_kinds", np.uint8)
    sequences = np.arange(len(schema.sequences), dtype=np.uint8)[:, None, None]
    deep, (shared, past, item) = unique_rows(
        [
            (schema.shared_slots, stacked("shared_keys"), stacked("shared_mask")),
            (schema.history_slots, padded("history_keys", np.int64, width), history_mask),
            (
                schema.item_slots,
                np.concatenate([f.item_keys for f in batch]),
                np.concatenate([f.item_mask for f in batch]),
            ),
        ],
        "deep",
    )
    wide, (crosses,) = unique_rows(
        [
            (
                schema.cross_slots,
                np.concatenate([f.cross_keys for f in batch]),
                np.concatenate([f.cross_mask for f in batch]),
            )
        ],
        "wide",
    )
    return Plan(
        deep=deep,
        wide=wide,
        shared=shared,
        history=past,
        history_masks=(kinds >> sequences & 1).astype(np.bool_) & history_mask[..., 0],
        history_gaps=padded("history_gaps", np.uint8),
        item=item,
        crosses=crosses,
        request=np.repeat(np.arange(len(batch), dtype=np.int64), [len(f.item_keys) for f in batch]),
        numbers=np.concatenate([f.numbers for f in batch]),
    )
