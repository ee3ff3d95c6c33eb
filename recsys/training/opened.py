"""An impression whose labels are not all known yet, and what is emitted of it. Legend: K items, T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.training.spill import Place
from recsys.types import Bool, Float32, Impression


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """Labels of one impression: some to train on now, some that are final now."""

    request_id: str
    time_ms: int
    features: bytes
    labels: Bool
    """[K, T]"""
    mask: Bool
    """[K, T] labels to train on."""
    final: Bool
    """[K, T] labels that are final now; each is so in one emission."""
    shown: Bool
    """[K] items that count as shown."""
    predictions: Float32
    """[K, T] as served; NaN where none was logged."""
    first: Bool
    """[K] the item's first emission: only it counts for admission, frequencies and batch statistics."""


OPEN_BYTES, ITEM_BYTES = 1500, 150
"""In memory, of an open impression and of each of its items beside the item's id; its features count a quarter, being on disk."""


@dataclass(slots=True)
class Opened:
    """One open impression; its features are spilled."""

    time_ms: int
    items: dict[str, int]
    labels: Bool
    observed: Bool
    """[K, T] labels as they were at the task's regular emission."""
    shown: Bool
    counted: Bool
    """[K] items that were emitted before."""
    predictions: Float32
    place: Place
    followed: Bool
    """[T] tasks whose feedback was looked at since it was opened: not of those that were declared later."""
    closed: int = 0
    """Ends that have passed."""
    num_bytes: int = 0
    """What it takes of the bound."""

    def state(self, request_id: str) -> list[Any]:
        """Everything but the features, as JSON-able values."""
        return [
            request_id,
            self.time_ms,
            list(self.items),
            [np.packbits(bits).tolist() for bits in (self.labels, self.observed, self.shown, self.counted)],
            self.predictions.astype(np.float64).ravel().tolist(),
            list(self.place),
            self.closed,
            self.num_bytes,
            *(() if self.followed.all() else (np.packbits(self.followed).tolist(),)),
        ]


def restored(state: Sequence[Any], tasks: int) -> tuple[str, Opened]:
    """The request and what `Opened.state` said of it."""
    request_id, time_ms, items, packed, predictions, place, closed, *rest = state
    size = len(items)
    shapes = ((size, tasks), (size, tasks), (size,), (size,))
    labels, observed, shown, counted = map(_unpacked, packed, shapes)
    known = np.array([np.nan if p is None else p for p in predictions], np.float32)
    return request_id, Opened(
        time_ms=time_ms,
        items={item: index for index, item in enumerate(items)},
        labels=labels,
        observed=observed,
        shown=shown,
        counted=counted,
        predictions=known.reshape(size, tasks),
        place=Place(*place),
        followed=_unpacked(rest[1], (tasks,)) if len(rest) > 1 else np.ones(tasks, np.bool_),
        closed=closed,
        num_bytes=rest[0] if rest else OPEN_BYTES + ITEM_BYTES * size + place[2] // 4,
    )


def _unpacked(packed: list[int], shape: tuple[int, ...]) -> Bool:
    return np.unpackbits(np.array(packed, np.uint8), count=int(np.prod(shape))).astype(np.bool_).reshape(shape)


def bytes_of(message: Impression) -> int:
    """What an impression will take of the bound."""
    ids = sum([len(item.item_id) for item in message.items])
    return OPEN_BYTES + ITEM_BYTES * len(message.items) + ids + len(message.features) // 4
