"""What a new row looks like, and what a caller may pass: shared by all implementations: a replay gives the same row.

Legend: N rows, D width of values, S width of optimiser state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.errors import TableFull
from recsys.keys import mix
from recsys.table.base import Layout, Segment
from recsys.types import Float32, Int32, Int64

_DEFAULT_ROW = 0x6A09E667F3BCC908
"""Mixed into the seed of default rows: every key is legal, so none can be reserved for them."""

LAST_SEEN_STEP_MS = 8000
"""Last-seen is kept in these steps, rounded up: three bytes a row reach over four years. A row may expire a step late."""


def last_seen(time_ms: Any) -> Any:
    """A time, or many, as last-seen keeps it."""
    return -(-time_ms // LAST_SEEN_STEP_MS) * LAST_SEEN_STEP_MS


def state_width(segment: Segment) -> int:
    """Floats of optimiser state of a segment: none, one a weight (Adagrad), or one for all (row-wise Adagrad)."""
    return {"sgd": 0, "adagrad": segment.dim, "rowwise_adagrad": 1}[segment.optimizer]


def initial_values(layout: Layout, slots: Int32, keys: Int64) -> Float32:
    """Values [N, D] of new rows: uniform in ±init_scale, a hash of (seed, slot, key, position)."""
    return _uniform(layout, layout.seed, slots, keys)


def default_values(layout: Layout) -> Float32:
    """Initial values of the shared default rows [slots, D], in order of slot: as new rows of another seed."""
    slots = np.array(sorted(layout.slots), np.int32)
    return _uniform(layout, layout.seed ^ _DEFAULT_ROW, slots, np.zeros(len(slots), np.int64))


def initial_state(layout: Layout) -> Float32:
    """Optimiser state [S] of a new row."""
    parts = [np.full(state_width(s), s.initial_accumulator, np.float32) for s in layout.segments]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def seed_head(seed: int) -> npt.NDArray[np.uint64]:
    """The mixed seed [1] that the hash of a row's values begins with."""
    return mix(np.array([seed % 2**64], np.uint64))


def scales(layout: Layout) -> Float32:
    """The bound of each initial value [D]."""
    return np.concatenate([np.full(s.dim, s.init_scale, np.float32) for s in layout.segments])


def _uniform(layout: Layout, seed: int, slots: Int32, keys: Int64) -> Float32:
    head = seed_head(seed)
    row = mix(mix(slots.astype(np.uint64) + head) + keys.view(np.uint64))
    position = np.arange(layout.dim, dtype=np.uint64)
    bits: npt.NDArray[np.uint64] = mix(row[:, None] + position) >> np.uint64(40)
    # 24 bits fit a float32 exactly: the only rounding is the product with the scale.
    return (bits.astype(np.float32) * np.float32(2**-23) - np.float32(1)) * scales(layout)


def check_layout(layout: Layout) -> None:
    """ValueError if the layout cannot be a table."""
    if not layout.slots or not layout.segments or min(s.dim for s in layout.segments) < 1:
        raise ValueError(f"layout {layout.name!r} needs at least one slot, and segments of dim >= 1")
    if min(layout.slots) < 0 or max(layout.slots) >= 2**16 or not 0 < layout.capacity < 2**31 - 2**16:
        raise ValueError(f"layout {layout.name!r}: slots must be in [0, 65536), capacity in (0, 2^31 - 65536)")
    if len(layout.slots) > 256:
        raise ValueError(f"layout {layout.name!r} has {len(layout.slots)} slots, at most 256 share a table: make two")


def check_pairs(layout: Layout, slots: Int32, keys: Int64, *others: npt.NDArray[Any]) -> None:
    """ValueError unless all have the same length and every slot is in the layout."""
    arrays: list[npt.NDArray[Any]] = [slots, keys, *others]
    if slots.ndim != 1 or keys.ndim != 1 or any(len(array) != len(keys) for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"table {layout.name!r}: slots, keys and rows must agree in length, got {shapes}")
    unknown = set(np.unique(slots).tolist()) - set(layout.slots)
    if unknown:
        raise ValueError(f"table {layout.name!r} has no slot {min(unknown)}: its slots are {sorted(layout.slots)}")


def check_width(layout: Layout, name: str, array: npt.NDArray[Any], *widths: int) -> None:
    """ValueError unless the array is [N, one of the widths]."""
    if array.ndim != 2 or array.shape[1] not in widths:
        raise ValueError(f"table {layout.name!r}: {name} must be [N, {widths[0]}], got {array.shape}")


def table_full(layout: Layout, rows: int, new: int) -> TableFull:
    """The error that names table, rows and remedy."""
    return TableFull(
        f"table {layout.name!r} holds {rows} of {layout.capacity} rows and {new} more are needed: "
        "raise table.capacity, or let rows expire sooner (table.expiry_s)"
    )
