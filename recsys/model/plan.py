"""From features to rows: which rows a batch looks up, and where each of them goes. Numpy only.

Legend: R requests, M items in all, U unique (slot, key) pairs, T history entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.features.build import Features
from recsys.features.schema import Schema
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


def unique_rows(parts: Sequence[tuple[Int32, Int64, Bool]], layout: str) -> tuple[Block, list[Index]]:
    """Unique (slot, key) pairs of several column blocks, each (slots [C], keys [..., C], mask [..., C]).

    Exact: keys are made unique slot by slot, so two slots never share a row.
    """
    places = [np.full(keys.shape, -1, np.intp) for _, keys, _ in parts]
    all_slots, all_keys, count = [], [], 0
    for slot in sorted({int(slot) for slots, _, _ in parts for slot in slots}):
        chosen = [(part, mask[..., slots == slot]) for part, (slots, _, mask) in enumerate(parts)]
        values = np.concatenate([parts[part][1][..., parts[part][0] == slot][present] for part, present in chosen])
        keys, inverse = np.unique(values, return_inverse=True)
        start = 0
        for part, present in chosen:
            width = int(present.sum())
            block = np.full(present.shape, -1, np.intp)
            block[present] = inverse[start : start + width] + count
            places[part][..., parts[part][0] == slot] = block
            start += width
        all_slots.append(np.full(len(keys), slot, np.int32))
        all_keys.append(keys)
        count += len(keys)
    slots = np.concatenate(all_slots) if all_slots else np.zeros(0, np.int32)
    keys = np.concatenate(all_keys) if all_keys else np.zeros(0, np.int64)
    for place in places:
        place[place < 0] = count
    return Block(layout=layout, slots=slots, keys=keys), places


def plan(schema: Schema, batch: Sequence[Features]) -> Plan:
    """Lay out several requests' features as one batch; histories are padded to the longest."""
    longest = max(1, max(len(f.user.history_keys) for f in batch))
    width = len(schema.history_slots)
    history = np.zeros((len(batch), longest, width), np.int64)
    history_mask = np.zeros((len(batch), longest, width), np.bool_)
    kinds, gaps = np.zeros((len(batch), longest), np.uint8), np.zeros((len(batch), longest), np.uint8)
    for request, f in enumerate(batch):
        length = len(f.user.history_keys)
        history[request, :length] = f.user.history_keys
        history_mask[request, :length] = f.user.history_mask
        kinds[request, :length] = f.user.history_kinds
        gaps[request, :length] = f.user.history_gaps
    sequences = np.arange(len(schema.sequences), dtype=np.uint8)[:, None, None]
    deep, (shared, past, item) = unique_rows(
        [
            (
                schema.shared_slots,
                np.stack([f.user.shared_keys for f in batch]),
                np.stack([f.user.shared_mask for f in batch]),
            ),
            (schema.history_slots, history, history_mask),
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
        history_gaps=gaps,
        item=item,
        crosses=crosses,
        request=np.repeat(np.arange(len(batch), dtype=np.int64), [len(f.item_keys) for f in batch]),
        numbers=np.concatenate([f.numbers for f in batch]),
    )
