"""What a new row looks like, and what a caller may pass: shared by all implementations: a replay gives the same row.

Legend: N rows, D width of values, S width of optimiser state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.errors import TableFull
from recsys.keys import mix
from recsys.table.base import Layout, Pending, Precision, Segment
from recsys.types import Float32, Int32, Int64

_DEFAULT_ROW = 0x6A09E667F3BCC908
"""Mixed into the seed of default rows: every key is legal, so none can be reserved for them."""

ROUNDING_SEED = 0x3C6EF372FE94F82B
"""Mixed into the seed of stochastic rounding."""
FILTER_SEED = 0xA54FF53A5F1D36F1
"""Mixed into the seed of the counting filter."""
LARGEST: dict[Precision, np.float32] = {"float16": np.float32(65504), "bfloat16": np.float32(2.0**127 * (2 - 2**-7))}

LAST_SEEN_STEP_MS = 8000
"""Last-seen is kept in these steps, rounded up: three bytes a row reach over four years. A row may expire a step late."""


def last_seen(time_ms: Any) -> Any:
    """A time, or many, as last-seen keeps it."""
    return -(-time_ms // LAST_SEEN_STEP_MS) * LAST_SEEN_STEP_MS


def state_width(segment: Segment) -> int:
    """Floats of optimiser state of a segment. Adam: means, squares, steps; FTRL: z, squares."""
    dim = segment.dim
    return {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim + 1, "ftrl": 2 * dim}[segment.optimizer]


def initial_values(layout: Layout, slots: Int32, keys: Int64) -> Float32:
    """Values [N, D] of new rows: uniform in ±init_scale, a hash of (seed, slot, key, position)."""
    return _uniform(layout, layout.seed, slots, keys)


def default_values(layout: Layout) -> Float32:
    """Initial values of the shared default rows [slots, D], in order of slot: as new rows of another seed."""
    slots = np.array(sorted(layout.slots), np.int32)
    return _uniform(layout, layout.seed ^ _DEFAULT_ROW, slots, np.zeros(len(slots), np.int64))


def initial_state(layout: Layout) -> Float32:
    """Optimiser state [S] of a new row."""
    parts = []
    for segment in layout.segments:
        part = np.full(state_width(segment), segment.initial_accumulator, np.float32)
        part[: {"adam": len(part), "ftrl": segment.dim}.get(segment.optimizer, 0)] = 0
        parts.append(part)
    return np.concatenate([*parts, np.zeros(int(layout.rounding == "stochastic"), np.float32)])


def seed_head(seed: int) -> npt.NDArray[np.uint64]:
    """The mixed seed [1] that the hash of a row's values begins with."""
    return mix(np.array([seed % 2**64], np.uint64))


def scales(layout: Layout) -> Float32:
    """The bound of each initial value [slots, D], in order of slot."""
    rows = [
        [
            s.init_scale if layout.slots[slot].init_scale is None else layout.slots[slot].init_scale
            for s in layout.segments
        ]
        for slot in sorted(layout.slots)
    ]
    return np.repeat(np.array(rows, np.float32), [s.dim for s in layout.segments], axis=1)


def _uniform(layout: Layout, seed: int, slots: Int32, keys: Int64) -> Float32:
    head = seed_head(seed)
    row = mix(mix(slots.astype(np.uint64) + head) + keys.view(np.uint64))
    position = np.arange((layout.dim + 1) // 2, dtype=np.uint64)
    hashed: npt.NDArray[np.uint64] = mix(row[:, None] + position)
    # Of 64 bits, the highest 24 make a value of the first half of the row, the next but eight one of the second.
    bits = np.concatenate([hashed >> np.uint64(40), hashed >> np.uint64(8) & np.uint64(0xFFFFFF)], 1)[:, : layout.dim]
    # 24 bits fit a float32 exactly: the only rounding is the product with the scale.
    scale = scales(layout)[np.searchsorted(sorted(layout.slots), slots)]
    return round_nearest((bits.astype(np.float32) * np.float32(2**-23) - np.float32(1)) * scale, layout.precision)


def round_nearest(values: Float32, precision: Precision) -> Float32:
    """The nearest values (ties to even) that the precision can hold, the largest finite one for what is larger."""
    if precision == "float32":
        return values
    values = np.clip(values, -LARGEST[precision], LARGEST[precision])
    if precision == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)).view(np.float32)


def round_stochastic(values: Float32, precision: Precision, draws: npt.NDArray[np.uint64]) -> Float32:
    """One of the two nearest values that the precision can hold: the one farther from 0 if a draw (24 bits) is below the
    share of the way to it (exact down to 13 bits for float16, 16 for bfloat16)."""
    values = np.clip(values, -LARGEST[precision], LARGEST[precision])
    bits, draws = values.view(np.uint32), draws.astype(np.uint32)
    cut, shift = (np.uint32(16), np.uint32(8)) if precision == "bfloat16" else (np.uint32(13), np.uint32(11))
    low = bits & np.uint32((1 << int(cut)) - 1)
    away = np.where(draws >> shift < low, np.uint32(1 << int(cut)), np.uint32(0))
    rounded = (bits - low + away).view(np.float32)
    if precision == "float16":
        steps = np.abs(values) * np.float32(2**24)  # below 2^-14 halves are multiples of 2^-24
        whole = np.floor(steps)
        whole += draws.astype(np.float32) * np.float32(2**-24) < steps - whole
        rounded = np.where(steps < 1024, np.copysign(whole * np.float32(2**-24), values), rounded)
    return np.asarray(rounded, np.float32)


def draws(layout: Layout, slot: int, key: int, updates: int) -> npt.NDArray[np.uint64]:
    """24 random bits for each value [D] of a row that had this many steps before."""
    head: npt.NDArray[np.uint64] = mix(np.array([slot]).astype(np.uint64) + seed_head(layout.seed ^ ROUNDING_SEED))
    row: npt.NDArray[np.uint64] = mix(head + np.array([key]).view(np.uint64)) + np.uint64(updates * 65536)
    places = np.arange(layout.dim, dtype=np.uint64) + row
    return np.asarray(mix(places) >> np.uint64(40))


def filter_places(layout: Layout, slots: Int32, keys: Int64) -> Int64:
    """Which counter of the filter each key has in each of its four rows [4, N] (double hashing)."""
    each = -(-layout.filter_counters // 4)
    head = seed_head(layout.seed ^ FILTER_SEED)
    h = mix(slots.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + keys.view(np.uint64) + head)
    first, second = h & np.uint64(0xFFFFFFFF), h >> np.uint64(32) | np.uint64(1)
    row = np.arange(4, dtype=np.uint64)[:, None]
    at = (first + row * second & np.uint64(0xFFFFFFFF)) * np.uint64(each) >> np.uint64(32)
    return (at + row * np.uint64(each)).astype(np.int64)


def filter_period_ms(layout: Layout) -> int | None:
    """How often the filter's counters are halved; None: never."""
    expiries = [policy.expiry_s for policy in layout.slots.values()]
    return None if None in expiries else int(max(e for e in expiries if e is not None) * 1000)


def check_layout(layout: Layout) -> None:
    """ValueError if the layout cannot be a table."""
    if not layout.slots or not layout.segments or min(s.dim for s in layout.segments) < 1:
        raise ValueError(f"layout {layout.name!r} needs at least one slot, and segments of dim >= 1")
    if min(layout.slots) < 0 or max(layout.slots) >= 2**16 or not 0 < layout.capacity < 2**31 - 2**16:
        raise ValueError(f"layout {layout.name!r}: slots must be in [0, 65536), capacity in (0, 2^31 - 65536)")
    if len(layout.slots) > 256:
        raise ValueError(f"layout {layout.name!r} has {len(layout.slots)} slots, at most 256 share a table: make two")
    starts = scales(layout)
    for segment, start in zip(layout.segments, np.cumsum([0, *(s.dim for s in layout.segments)]), strict=False):
        if segment.optimizer == "ftrl" and starts[:, start : start + segment.dim].any():
            raise ValueError(
                f"layout {layout.name!r}: segment {segment.name!r} learns by FTRL: its init_scale must be 0"
            )
    if layout.rounding == "stochastic" and layout.precision == "float32":
        raise ValueError(f"layout {layout.name!r}: stochastic rounding is for float16 and bfloat16")
    if layout.filter_counters < 0 or (layout.filter_counters and max(p.admission for p in layout.slots.values()) > 255):
        raise ValueError(f"layout {layout.name!r}: with a filter (filter_counters >= 0) admission is at most 255")


def check_pairs(layout: Layout, slots: Int32, keys: Int64, *others: npt.NDArray[Any]) -> None:
    """ValueError unless all have the same length and every slot is in the layout."""
    arrays: list[npt.NDArray[Any]] = [slots, keys, *others]
    if slots.ndim != 1 or keys.ndim != 1 or any(len(array) != len(keys) for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"table {layout.name!r}: slots, keys and rows must agree in length, got {shapes}")
    unknown = set(np.unique(slots).tolist()) - set(layout.slots)
    if unknown:
        raise ValueError(f"table {layout.name!r} has no slot {min(unknown)}: its slots are {sorted(layout.slots)}")


def check_sketch(layout: Layout, pending: Pending) -> None:
    """ValueError unless the filter's counters are those of this layout."""
    want = -(-layout.filter_counters // 4) * 4
    if len(pending.sketch) != want:
        raise ValueError(
            f"table {layout.name!r} has a filter of {want} counters, got {len(pending.sketch)}: "
            "use the configuration it was saved with (filter_counters)"
        )


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
