"""The one feature function: (user state, item columns, context, counters) to keys and numbers.

Used by ranking, backfill and replay; the trainer learns from what was logged as served. Legend: see `schema.py`;
K items of one request, T history entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from recsys.errors import BadInput
from recsys.features import feature_kernels
from recsys.features.catalogue import Catalogue
from recsys.features.counters import columns_of, kept
from recsys.features.numeric import bucket_of, number_of, squashed
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.types import Bool, Float32, HistoryEvent, Int32, Int64, UInt8

Index = npt.NDArray[np.intp]

GAP_BUCKETS = 32
"""Buckets of the time since a history event: bucket b begins at 2^(b/1.5) - 1 s, the last at 19 days."""
MAX_NUMBER = 1000.0
"""Of a feature's number as logged: all are shares, logarithms or squashed, and the largest that any of those can be is 710."""
_NO_NUMBERS = np.zeros((0, 2), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFeatures:
    """The shared block: shared keys [S], history keys [T, H], newest first, at most `history_len` of each sequence."""

    shared_keys: Int64
    shared_mask: Bool
    history_keys: Int64
    history_mask: Bool
    history_kinds: UInt8
    """[T] bit s: the entry belongs to sequence s."""
    history_gaps: UInt8
    """[T] bucket of the time since the event; 0 unless the schema has `time_gaps`."""
    numbers: Float32 = field(default_factory=lambda: _NO_NUMBERS)
    """Declared numbers that all items share, each with whether it is missing [U, 2]. Not encoded: the items' own hold them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """One request's keys and numbers: the shared block and K items: item keys [K, I], crosses [K, C], numbers [K, N]."""

    user: UserFeatures
    item_keys: Int64
    item_mask: Bool
    cross_keys: Int64
    cross_mask: Bool
    numbers: Float32

    def take(self, rows: Sequence[int] | Index) -> Features:
        """The same request with only these of its K items."""
        chosen = np.asarray(rows, np.int64)
        return Features(
            user=self.user,
            item_keys=self.item_keys[chosen],
            item_mask=self.item_mask[chosen],
            cross_keys=self.cross_keys[chosen],
            cross_mask=self.cross_mask[chosen],
            numbers=self.numbers[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What counters say about the K items, as of the request: see `Schema.numbers`."""

    counters: Float32
    """[K, the schema's counter numbers]"""
    popularity: Float32
    covisit: Float32
    follows: Float32
    """[K, the schema's transition numbers]"""


def user_features(
    schema: Schema,
    catalogue: Catalogue,
    user_id: str,
    history: Sequence[HistoryEvent],
    context: Mapping[str, Any],
    now_ms: int = 0,
) -> UserFeatures:
    """Keys of the user, the context and the newest `history_len` history events of each sequence."""
    shared_keys, shared_mask = shared_columns(schema, user_id, context)
    recent, kinds = newest(schema, history)
    keys, mask = history_columns(schema, catalogue, [key_of(event.item_id) for event in recent])
    return UserFeatures(
        shared_keys=shared_keys,
        shared_mask=shared_mask,
        history_keys=keys,
        history_mask=mask,
        history_kinds=kinds,
        history_gaps=_gaps(recent, now_ms) if schema.time_gaps else np.zeros(len(recent), np.uint8),
        numbers=_shared_numbers(schema, history, context, now_ms) if schema.declared else _NO_NUMBERS,
    )


def _shared_numbers(
    schema: Schema, history: Sequence[HistoryEvent], context: Mapping[str, Any], now_ms: int
) -> Float32:
    found = [number_of(context.get(name)) for kind, name in schema.declared if kind == "context"]
    if ("event", "last_event") in schema.declared:
        found.append(max(now_ms - history[-1].time_ms, 0) / 1000 if history else np.nan)
    return squashed(np.array(found, np.float64))


def shared_columns(schema: Schema, user_id: str, context: Mapping[str, Any]) -> tuple[Int64, Bool]:
    """Keys and mask of the user and the context [S]."""
    keys, mask = np.zeros(len(schema.shared_slots), np.int64), np.zeros(len(schema.shared_slots), np.bool_)
    keys[0], mask[0] = key_of(user_id), True
    for column, name in enumerate(schema.context, start=1):
        value = context.get(name)
        if name in schema.edges:
            value = bucket_of(value, schema.edges[name])
        if value is not None:
            keys[column], mask[column] = key_of(value if isinstance(value, str) else str(value)), True
    return keys, mask


class Typed(Protocol):
    """An event of a history, as far as its place in the sequences goes."""

    @property
    def type(self) -> str: ...


Event = TypeVar("Event", bound=Typed)


def history_columns(schema: Schema, catalogue: Catalogue, item_keys: Sequence[int] | Int64) -> tuple[Int64, Bool]:
    """Keys and mask [T, H] of history items by their keys [T]; of one that the catalogue does not have, its key alone."""
    wanted, width = np.array(item_keys, np.int64), len(schema.history_slots)
    rows = catalogue.rows_of(wanted)
    known = np.maximum(rows, 0)
    keys, mask = catalogue.keys.take(known, 0)[:, :width], catalogue.mask.take(known, 0)[:, :width]
    unknown = rows < 0
    if unknown.any():
        keys[unknown], mask[unknown] = 0, False
        keys[unknown, 0], mask[unknown, 0] = wanted[unknown], True
    return keys, mask


def newest(schema: Schema, history: Sequence[Event]) -> tuple[Sequence[Event], UInt8]:
    """The newest events of each sequence, newest first, and the sequences that each belongs to."""
    if schema.sequences == ((),):
        recent = history[: -schema.history_len - 1 : -1]
        return recent, np.ones(len(recent), np.uint8)
    left = [schema.history_len] * len(schema.sequences)
    chosen, kinds = [], []
    for event in reversed(history):
        bits = 0
        for sequence in schema.members.get(event.type, ()):
            if left[sequence]:
                left[sequence] -= 1
                bits |= 1 << sequence
        if bits:
            chosen.append(event)
            kinds.append(bits)
        elif not any(left):
            break
    return chosen, np.array(kinds, np.uint8)


def _gaps(recent: Sequence[HistoryEvent], now_ms: int) -> UInt8:
    seconds = np.array([now_ms - event.time_ms for event in recent]) / 1000
    bucket = 1.5 * np.log2(1.0 + np.maximum(seconds, 0.0))
    return np.minimum(bucket, GAP_BUCKETS - 1).astype(np.uint8)


def item_features(
    schema: Schema,
    catalogue: Catalogue,
    user: UserFeatures,
    rows: Int32,
    signals: Signals,
    affinity_decay: float,
    now_ms: int = 0,
) -> Features:
    """Keys, crosses and numbers of the items at catalogue rows [K] as of log time `now_ms`."""
    item_keys, item_mask = catalogue.keys[rows], catalogue.mask[rows]
    cross_keys, cross_mask = _crosses(schema, user, item_keys, item_mask)
    numbers = np.empty((len(rows), len(schema.numbers)), np.float32)
    start = len(schema.counters.numbers)
    numbers[:, :start] = signals.counters
    numbers[:, start] = np.log1p(signals.popularity)
    numbers[:, start + 1] = np.log1p(signals.covisit)
    weights = affinity_decay ** np.arange(len(user.history_keys))
    _resemblance(schema, user, (item_keys, item_mask), weights, numbers, start + 2)
    if schema.declared:
        first = schema.first_declared
        numbers[:, first : first + 2 * len(schema.declared)] = _declared(schema, catalogue, user, rows, now_ms)
    if signals.follows.shape[1]:
        numbers[:, -signals.follows.shape[1] :] = signals.follows
    return Features(
        user=user,
        item_keys=item_keys,
        item_mask=item_mask,
        cross_keys=cross_keys,
        cross_mask=cross_mask,
        numbers=numbers,
    )


def _declared(schema: Schema, catalogue: Catalogue, user: UserFeatures, rows: Int32, now_ms: int) -> Float32:
    """Declared numbers, each beside whether it is missing [K, 2 per number]."""
    shared = len(user.numbers)
    values = np.full((len(rows), len(schema.declared) - shared), np.nan)
    for column, (kind, name) in enumerate(schema.declared[shared:]):
        if (known := catalogue.numbers.get(name)) is not None:
            values[:, column] = np.maximum(now_ms - known[rows], 0) / 1000 if kind == "time" else known[rows]
    own = squashed(values)
    everyone = np.broadcast_to(user.numbers, (len(rows), shared, 2))
    return np.concatenate([everyone, own], 1).reshape(len(rows), -1)


def _resemblance(
    schema: Schema, user: UserFeatures, items: tuple[Int64, Bool], weights: Any, numbers: Float32, first: int
) -> None:
    """Whether an item is in the history, and its share of each history attribute's values, from the column `first` on."""
    past = kept(user.history_keys, np.int64), kept(user.history_mask, np.bool_)
    columns = [schema.item_columns[name] for name, _ in schema.item_fields[1 : schema.num_history_fields]]
    fields = np.array([(where.start, where.stop) for where in columns], np.int64).reshape(-1, 2)
    feature_kernels.affinities(past, weights, items, fields, first, numbers)


def _crosses(schema: Schema, user: UserFeatures, item_keys: Int64, item_mask: Bool) -> tuple[Int64, Bool]:
    keys = np.zeros((len(item_keys), len(schema.cross_slots)), np.int64)
    mask = np.zeros(keys.shape, np.bool_)
    columns = columns_of(user.shared_keys, user.shared_mask, item_keys, item_mask)
    newest = slice(schema.cross_history)
    past_keys, past_mask = kept(user.history_keys[newest], np.int64), kept(user.history_mask[newest], np.bool_)
    feature_kernels.crosses(columns, past_keys, past_mask, schema.cross_spec, keys, mask)
    return keys, mask


def warm_up(schema: Schema) -> None:
    """Compile what `item_features` calls, or read it from the on-disk cache: no request waits for it."""
    none = user_features(schema, Catalogue(schema), "", (), {})
    items = np.zeros((0, len(schema.item_slots)), np.int64), np.zeros((0, len(schema.item_slots)), np.bool_)
    _crosses(schema, none, *items)
    _resemblance(schema, none, items, np.zeros(0), np.zeros((0, 1), np.float32), 0)


def encode(features: Features) -> bytes:
    """Little-endian: history length and item count (uint16), then keys (int64), masks (packed bits), the history's kinds
    and gaps (uint8), numbers (float32)."""
    user = features.user
    keys = (user.shared_keys, user.history_keys, features.item_keys, features.cross_keys)
    masks = (user.shared_mask, user.history_mask, features.item_mask, features.cross_mask)
    head = np.array([len(user.history_keys), len(features.item_keys)], "<u2").tobytes()
    return b"".join(
        [
            head,
            *(np.ascontiguousarray(k, "<i8").tobytes() for k in keys),
            np.packbits(np.concatenate([m.ravel() for m in masks])).tobytes(),
            user.history_kinds.tobytes(),
            user.history_gaps.tobytes(),
            np.ascontiguousarray(features.numbers, "<f4").tobytes(),
        ]
    )


def decode(schema: Schema, data: bytes) -> Features:
    """The inverse of `encode`. BadInput when a length does not fit the schema, or a value is none that `encode` is given."""
    if len(data) < 4:
        raise BadInput(f"features: {len(data)} bytes are too few; write them with the same schema", field="features")
    history, items = (int(n) for n in np.frombuffer(data, "<u2", 2))
    if history > schema.history_len * len(schema.sequences):
        raise BadInput(
            f"features: a history of {history} events, schema {schema.hash} has at most {schema.history_len} of each sequence; "
            "write them with the same schema",
            field="features",
        )
    shapes = [
        (len(schema.shared_slots),),
        (history, len(schema.history_slots)),
        (items, len(schema.item_slots)),
        (items, len(schema.cross_slots)),
    ]
    sizes = [math.prod(shape) for shape in shapes]
    packed, numbers = (sum(sizes) + 7) // 8, items * len(schema.numbers)
    expected = 4 + 8 * sum(sizes) + packed + 2 * history + 4 * numbers
    if len(data) != expected:
        raise BadInput(
            f"features: {len(data)} bytes, schema {schema.hash} needs {expected}; write them with the same schema",
            field="features",
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8, packed, 4 + 8 * sum(sizes)), count=sum(sizes)).view(np.bool_)
    keys, masks, start = [], [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        keys.append(np.frombuffer(data, "<i8", size, 4 + 8 * start).reshape(shape))
        masks.append(bits[start : start + size].reshape(shape))
        start += size
    values = np.frombuffer(data, "<f4", numbers, expected - 4 * numbers).reshape(items, len(schema.numbers))
    if not (np.abs(values) <= MAX_NUMBER).all():  # NaN is not, either
        raise BadInput(
            f"features: a number is not finite or beyond {MAX_NUMBER:g}; write only what the feature function makes",
            field="features",
        )
    kinds, gaps = np.frombuffer(data, np.uint8, 2 * history, 4 + 8 * sum(sizes) + packed).reshape(2, history)
    if (gaps >= GAP_BUCKETS).any() or (kinds >> len(schema.sequences)).any():
        raise BadInput(
            f"features: unknown sequence or time gap; write them with schema {schema.hash}", field="features"
        )
    user = UserFeatures(
        shared_keys=keys[0],
        shared_mask=masks[0],
        history_keys=keys[1],
        history_mask=masks[1],
        history_kinds=kinds,
        history_gaps=gaps,
    )
    return Features(
        user=user, item_keys=keys[2], item_mask=masks[2], cross_keys=keys[3], cross_mask=masks[3], numbers=values
    )
