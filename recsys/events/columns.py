"""Messages to and from Arrow columns: the layout of the Parquet event files.

An event file has one column for each field of its message; `context`, `attributes` and `predictions` are columns of
JSON text (their fields have no fixed type), the items of an impression a list of structs. Columns are checked as a
whole and only a column that fails is gone through row by row, for the message: about 3 µs an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeAlias

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import BadInput
from recsys.events import fields
from recsys.events.messages import ACTIVATIONS, check_distinct
from recsys.types import Feedback, Impression, Item, ShownItem

Message: TypeAlias = Item | Impression | Feedback
Check: TypeAlias = Callable[[Any, str], Any]

_ID, _JSON, _TEXT = pa.string(), pa.string(), pa.string()
_POOL = pa.list_(pa.struct([("item_id", _ID), ("probability", pa.float64())]))
_SHOWN = {
    "item_id": _ID,
    "position": pa.int32(),
    "sources": pa.list_(_TEXT),
    "score": pa.float64(),
    "predictions": _JSON,
    "propensity": pa.float64(),
    "pool": _POOL,
}
LAYOUT: dict[str, dict[str, Any]] = {
    "item": {"item_id": _ID, "title": _TEXT, "attributes": _JSON, "deleted": pa.bool_()},
    "impression": {
        "request_id": _ID,
        "user_id": _ID,
        "time_ms": pa.int64(),
        "items": pa.list_(pa.struct(list(_SHOWN.items()))),
        "context": _JSON,
        "session_id": _ID,
        "activation": _TEXT,
        "schema": _TEXT,
        "features": pa.binary(),
        "bandit": pa.binary(),
        "policy": _TEXT,
        "model_version": _TEXT,
        "generation": _TEXT,
    },
    "feedback": {
        "event_id": _ID,
        "user_id": _ID,
        "item_id": _ID,
        "type": _TEXT,
        "time_ms": pa.int64(),
        "session_id": _ID,
        "request_id": _ID,
        "value": pa.float64(),
        "context": _JSON,
    },
}
REQUIRED = {
    "item": ("item_id",),
    "impression": ("request_id", "user_id", "time_ms", "items"),
    "feedback": ("event_id", "user_id", "item_id", "type", "time_ms"),
}


def arrow_schema(kind: str) -> Any:
    """The Arrow schema of one kind of event file."""
    return pa.schema([pa.field(n, t, nullable=n not in REQUIRED[kind]) for n, t in LAYOUT[kind].items()])


def batch_of(kind: str, messages: Sequence[Any]) -> Any:
    """The record batch of some messages of one kind."""
    columns = []
    for name, kind_of in LAYOUT[kind].items():
        values = [getattr(m, name) for m in messages]
        if name == "items":
            columns.append(_shown_array(values))
        else:
            columns.append(pa.array(map(_json, values) if name in ("context", "attributes") else values, kind_of))
    return pa.RecordBatch.from_arrays(columns, schema=arrow_schema(kind))


def messages_of(kind: str, batch: Any) -> list[Any]:
    """The messages of one record batch of the layout's types, checked; RowError names the first bad row of a column."""
    return _READERS[kind](_Columns({n: batch.column(n) for n in batch.schema.names}))


class RowError(BadInput):
    """Bad input in one row of a batch; `row` counts from 0."""

    def __init__(self, error: BadInput, row: int) -> None:
        super().__init__(str(error), field=error.field)
        self.row = row


class _Columns:
    """The columns of a batch, each read as a list of Python values, checked."""

    def __init__(self, arrays: Mapping[str, Any], num_rows: int | None = None) -> None:
        self._arrays = arrays
        self.num_rows = len(next(iter(arrays.values()))) if num_rows is None else num_rows

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def has(self, name: str) -> bool:
        return name in self._arrays and self._arrays[name].null_count < self.num_rows

    def ids(self, name: str, *, required: bool = False) -> Iterable[Any]:
        if not required and not self.has(name):
            return repeat(None, self.num_rows)
        array, values = self._arrays[name], _objects(self._arrays[name])
        shortest, longest = pc.min_max(pc.binary_length(array)).as_py().values()
        fine = array.null_count == 0 or not required
        if fine and shortest and longest <= fields.MAX_ID_BYTES and "".join(filter(None, values)).isprintable():
            return values
        return _each(values, name, fields.parse_id, required)

    def distinct(self, name: str, check: Check, default: Any, *, required: bool = False) -> Iterable[Any]:
        """A column of few values (texts, JSON): each distinct value is checked once. Rows then share one object."""
        if not required and not self.has(name):
            return repeat(default, self.num_rows)
        encoded = self._arrays[name].dictionary_encode()
        rows = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        checked = []
        for code, value in enumerate(encoded.dictionary.to_pylist()):
            try:
                checked.append(check(value, name))
            except BadInput as error:
                raise RowError(error, int(np.argmax(rows == code))) from None
        if required and (rows < 0).any():
            raise RowError(fields.bad(name, None, "is required"), int(np.argmax(rows < 0)))
        checked.append(default)  # index −1: null
        return [checked[i] for i in rows.tolist()]

    def texts(self, name: str, limit: int) -> Iterable[str]:
        return self.distinct(name, lambda v, f: fields.parse_text(v, f, limit), "")

    def integers(self, name: str, low: int, high: int, check: Check) -> list[int]:
        array = self._arrays[name]
        if array.null_count == 0:
            values = array.to_numpy()
            if not len(values) or (low <= values.min() and values.max() <= high):
                return values.tolist()
        return _each(_objects(array), name, check, required=True)

    def numbers(self, name: str, check: Check = fields.parse_number) -> Iterable[Any]:
        if not self.has(name):
            return repeat(None, self.num_rows)
        return _each(self._arrays[name].to_pylist(), name, check, required=False)


def _objects(array: Any) -> list[Any]:
    if array.null_count and not pa.types.is_string(array.type):
        return array.to_pylist()
    return array.to_numpy(zero_copy_only=False).tolist()


def _each(values: Iterable[Any], name: str, check: Check, required: bool) -> list[Any]:
    checked = []
    for row, value in enumerate(values):
        try:
            checked.append(None if value is None and not required else check(value, name))
        except BadInput as error:
            raise RowError(error, row) from None
    return checked


def _json(value: Mapping[str, Any] | None) -> str | None:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode() if value else None


def _json_of(parse: Check) -> Check:
    def check(value: str, field: str) -> Any:
        try:
            return parse(orjson.loads(value), field)
        except orjson.JSONDecodeError as error:
            raise fields.bad(field, value, f"is not JSON ({error}): write one JSON object as text") from None

    return check


_context = _json_of(fields.parse_context)


def _activation(value: Any, field: str) -> str:
    if value not in ACTIVATIONS:
        raise fields.bad(field, value, f"must be one of {ACTIVATIONS}")
    return str(value)


def _read_items(columns: _Columns) -> list[Item]:
    titles = columns.texts("title", fields.MAX_TEXT_BYTES)
    attributes = columns.distinct("attributes", _json_of(fields.parse_attributes), {})
    deleted = map(bool, _objects(columns["deleted"])) if columns.has("deleted") else repeat(False)
    rows = zip(columns.ids("item_id", required=True), titles, attributes, deleted, strict=False)
    return [Item(item_id=i, deleted=True) if d else Item(item_id=i, title=t, attributes=a) for i, t, a, d in rows]


def _times(columns: _Columns) -> list[int]:
    return columns.integers("time_ms", 0, fields.MAX_TIME_MS, fields.parse_time)


def _read_feedback(columns: _Columns) -> list[Feedback]:
    rows = zip(
        columns.ids("event_id", required=True),
        columns.ids("user_id", required=True),
        columns.ids("item_id", required=True),
        columns.distinct("type", lambda v, f: fields.parse_type(v), "", required=True),
        _times(columns),
        columns.ids("session_id"),
        columns.ids("request_id"),
        columns.numbers("value"),
        columns.distinct("context", _context, None),
        strict=True,
    )
    return [
        Feedback(event_id=e, user_id=u, item_id=i, type=k, time_ms=t, session_id=s, request_id=r, value=v, context=c)
        for e, u, i, k, t, s, r, v, c in rows
    ]


def _bytes(columns: _Columns, name: str) -> Iterable[Any]:
    return _objects(columns[name]) if columns.has(name) else repeat(b"")


def _read_impressions(columns: _Columns) -> list[Impression]:
    rows = zip(
        columns.ids("request_id", required=True),
        columns.ids("user_id", required=True),
        _times(columns),
        _read_shown(columns["items"]),
        columns.distinct("context", _context, {}),
        columns.ids("session_id"),
        columns.distinct("activation", _activation, "shown"),
        columns.texts("schema", fields.MAX_NAME_CHARS),
        _bytes(columns, "features"),
        _bytes(columns, "bandit"),
        columns.texts("policy", fields.MAX_ID_BYTES),
        columns.texts("model_version", fields.MAX_ID_BYTES),
        columns.texts("generation", fields.MAX_ID_BYTES),
        strict=False,
    )
    impressions: list[Impression] = []
    for r, u, t, i, c, s, a, h, f, b, p, m, g in rows:
        if f and not h:
            error = fields.bad("schema", h, "must name the slot list that `features` was written with")
            raise RowError(error, len(impressions))
        impressions.append(
            Impression(
                request_id=r,
                user_id=u,
                time_ms=t,
                items=i,
                context=c,
                session_id=s,
                activation=a,
                schema=h,
                features=f or b"",
                bandit=b or b"",
                policy=p,
                model_version=m,
                generation=g,
            )
        )
    return impressions


_READERS: dict[str, Callable[[_Columns], list[Any]]] = {
    "item": _read_items,
    "impression": _read_impressions,
    "feedback": _read_feedback,
}


def _read_shown(array: Any) -> list[tuple[ShownItem, ...]]:
    """The items of each impression, from list<struct>."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((lengths < 1) | (lengths > fields.MAX_ITEMS))
    if len(wrong):
        value = [None] * int(lengths[wrong[0]])
        error = fields.bad("items", value, f"must be a list of 1 to {fields.MAX_ITEMS} shown items")
        raise RowError(error, int(wrong[0]))
    bounds = [0, *accumulate(lengths.tolist())]
    flat = array.flatten()
    columns = _Columns(dict(zip((f.name for f in flat.type), flat.flatten(), strict=True)), len(flat))
    try:
        shown = _shown_items(columns)
    except RowError as inner:
        row = int(np.searchsorted(bounds, inner.row, side="right")) - 1
        where = f"items[{inner.row - bounds[row]}]"
        raise RowError(BadInput(f"{where}.{inner}", field=f"{where}.{inner.field}"), row) from None
    impressions = [tuple(shown[a:b]) for a, b in pairwise(bounds)]
    for row in np.flatnonzero(lengths > 1).tolist():
        try:
            check_distinct(impressions[row])
        except BadInput as twice:
            raise RowError(twice, row) from None
    return impressions


def _shown_items(columns: _Columns) -> list[ShownItem]:
    item_ids = list(columns.ids("item_id", required=True))
    sources: Iterable[Any] = repeat((), len(item_ids))
    pools: Iterable[Any] = repeat(None, len(item_ids))
    if columns.has("sources"):
        sources = _each((v or [] for v in columns["sources"].to_pylist()), "sources", fields.parse_sources, True)
    if columns.has("pool"):
        values = zip(columns["pool"].to_pylist(), item_ids, strict=True)
        pools = _each(values, "pool", lambda v, f: fields.parse_pool(_pairs(v[0]), v[1], f), True)
    rows = zip(
        item_ids,
        columns.integers("position", 1, fields.MAX_POSITION, fields.parse_position),
        sources,
        columns.numbers("score"),
        columns.distinct("predictions", _json_of(fields.parse_predictions), {}),
        columns.numbers("propensity", fields.parse_propensity),
        pools,
        strict=True,
    )
    return [
        ShownItem(item_id=i, position=n, sources=o, score=s, predictions=p, propensity=q, pool=c)
        for i, n, o, s, p, q, c in rows
    ]


def _pairs(pool: list[dict[str, Any] | None] | None) -> list[list[Any]] | None:
    return None if pool is None else [[] if p is None else [p["item_id"], p["probability"]] for p in pool]


def _shown_array(values: list[tuple[ShownItem, ...]]) -> Any:
    flat = [item for items in values for item in items]
    columns = []
    for name, kind_of in _SHOWN.items():
        column: Iterable[Any] = (getattr(item, name) for item in flat)
        if name == "predictions":
            column = map(_json, column)
        elif name == "pool":
            column = (p and [{"item_id": i, "probability": q} for i, q in p] for p in column)
        columns.append(pa.array([None if v == () else v for v in column], kind_of))
    offsets = pa.array([0, *accumulate(len(items) for items in values)], pa.int32())
    structs = pa.StructArray.from_arrays(columns, fields=list(LAYOUT["impression"]["items"].value_type))
    return pa.ListArray.from_arrays(offsets, structs)
