"""The rules of single fields of a public message: each function returns the value or raises BadInput.

Hostile input is expected: nothing here recurses, and no message repeats more than a few characters of what was sent.
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from recsys.errors import BadInput
from recsys.types import FORGET

MAX_ID_BYTES = 256
MAX_TEXT_BYTES = 1024
MAX_NAME_CHARS = 64
MAX_PLAIN = 64
"""So many printable characters are at most `MAX_ID_BYTES` and hold no control character."""
MAX_FIELDS = 64
"""Fields of a context or of an item's attributes."""
MAX_VALUES = 1000
"""Values of one attribute."""
MAX_ITEMS = 1000
"""Items of an impression, and of a pool."""
MAX_POSITION = 2**31 - 1
MAX_TIME_MS = 2**53
"""Beyond it a JSON number is not exact everywhere."""
MIN_INT, MAX_INT = -(2**63), 2**64 - 1
"""Integers that the JSON reader keeps exact."""
CONTROL = "[\\u0000-\\u001f\\u007f-\\u009f]"

_find_control = re.compile(CONTROL).search


def parse_id(value: Any, field: str) -> str:
    """A public id: a string of 1–256 bytes without control characters, or an integer: its decimal string."""
    if type(value) is str:
        if 0 < len(value) <= MAX_PLAIN and value.isprintable():  # the common case, at C speed
            return value
        if 0 < _num_bytes(value, field) <= MAX_ID_BYTES and not _find_control(value):
            return value
        raise bad(field, value, f"must have 1 to {MAX_ID_BYTES} bytes of UTF-8 and no control character")
    if type(value) is int and MIN_INT <= value <= MAX_INT:
        return str(value)
    raise bad(
        field,
        value,
        f"{'is required' if value is None else 'must be an id'}: a string, or an integer of at most 64 bits",
    )


def parse_time(value: Any, field: str = "time_ms") -> int:
    """Milliseconds since 1970."""
    if type(value) is int and 0 <= value <= MAX_TIME_MS:
        return value
    raise bad(field, value, "must be an integer: milliseconds since 1970-01-01 UTC, from 0 to 2^53")


def parse_position(value: Any, field: str) -> int:
    """A place in an answer."""
    if type(value) is int and 1 <= value <= MAX_POSITION:
        return value
    raise bad(field, value, "must be an integer, from 1 for the top")


def parse_number(value: Any, field: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within [low, high], as float."""
    if (type(value) is float or (type(value) is int and MIN_INT <= value <= MAX_INT)) and math.isfinite(value):
        if low <= value <= high:
            return float(value)
        raise bad(field, value, f"must lie from {low:g} to {high:g}")
    raise bad(field, value, "must be a finite number")


def parse_type(value: Any, *, internal: bool = False) -> str:
    """A feedback type."""
    if type(value) is str and 0 < len(value) <= MAX_NAME_CHARS and value[0] != "$" and value.isprintable():
        return value
    if internal and value == FORGET:
        return FORGET
    if type(value) is not str or not 0 < len(value) <= MAX_NAME_CHARS or value[0] == "$" or _find_control(value):
        raise bad(
            "type",
            value,
            "must be a string of 1 to 64 characters, not begin with '$' (reserved), without control characters",
        )
    _num_bytes(value, "type")
    return value


def parse_context(value: Any, field: str = "context") -> dict[str, Any]:
    """A flat object of strings, numbers and booleans."""
    return _fields(value, field, _scalar)


def parse_attributes(value: Any, field: str = "attributes") -> dict[str, Any]:
    """A flat object of strings, numbers, booleans and lists of strings."""
    return _fields(value, field, _attribute)


def parse_predictions(value: Any, field: str = "predictions") -> dict[str, Any]:
    """Task name → probability."""
    return _fields(value, field, lambda v, f: parse_number(v, f, 0.0, 1.0))


def shorten(value: Any) -> str:
    """A value for a message: never long, never recursive, whatever a stranger sent."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 60 else f"{value[:50]!r}… ({len(value)} long)"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return repr(value)[:60]


def bad(field: str, value: Any, remedy: str) -> BadInput:
    """The error that names the field, the value and the remedy."""
    return BadInput(f"{field} = {shorten(value)}: {remedy}", field=field)


def _fields(value: Any, field: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_FIELDS:
        raise bad(field, value, f"must be a flat object of at most {MAX_FIELDS} fields")
    for name in value:
        if type(name) is not str or not 0 < len(name) <= MAX_NAME_CHARS:
            raise bad(field, name, f"is no field name: must be a string of 1 to {MAX_NAME_CHARS} characters")
        if not name.isprintable():
            _num_bytes(name, field)
    return {name: check(v, f"{field}.{name}") for name, v in value.items()}


def _scalar(value: Any, field: str) -> Any:
    kind = type(value)
    if kind is str:
        if len(value) > MAX_TEXT_BYTES // 4 or not value.isprintable():
            parse_text(value, field, MAX_TEXT_BYTES)
        return value
    if kind is bool or (kind is int and MIN_INT <= value <= MAX_INT) or (kind is float and math.isfinite(value)):
        return value
    raise bad(field, value, "must be a string, a finite number or a boolean")


def _attribute(value: Any, field: str) -> Any:
    if type(value) is not list:
        return _scalar(value, field)
    if len(value) > MAX_VALUES:
        raise bad(field, value, f"must have at most {MAX_VALUES} values")
    for v in value:
        parse_text(v, field, MAX_TEXT_BYTES)
    return value


def parse_propensity(value: Any, field: str) -> float:
    """A probability above 0: what cannot be chosen is never shown."""
    number = parse_number(value, field, 0.0, 1.0)
    if not number:
        raise bad(field, value, "must be above 0: an item that could not be chosen was not shown")
    return number


def parse_pool(value: Any, item_id: str, field: str = "pool") -> tuple[tuple[str, float], ...] | None:
    """What a position was drawn from: [item_id, probability] pairs, the shown one among them; null: not drawn."""
    if value is None:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ITEMS:
        raise bad(field, value, f"must be a list of 1 to {MAX_ITEMS} [item_id, probability] pairs")
    pool: dict[str, float] = {}
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise bad(field, pair, "must be a pair [item_id, probability]")
        pool[parse_id(pair[0], field)] = parse_propensity(pair[1], field)
    if len(pool) != len(value):
        raise bad(field, value, "must name each item once")
    if item_id not in pool:
        raise bad(field, value, f"must contain the shown item {shorten(item_id)}")
    return tuple(pool.items())


def parse_sources(value: Any, field: str) -> tuple[str, ...]:
    """Names of candidate sources."""
    if not isinstance(value, list) or len(value) > MAX_FIELDS:
        raise bad(field, value, f"must be a list of at most {MAX_FIELDS} names")
    for v in value:
        parse_text(v, field, MAX_ID_BYTES)
    return tuple(value)


def parse_base64(value: Any, field: str) -> bytes:
    """Bytes as base64; none where there is nothing."""
    if value is None:
        return b""
    try:
        if type(value) is str:
            return binascii.a2b_base64(value, strict_mode=True)
    except (binascii.Error, ValueError):
        pass
    raise bad(field, value, "must be a base64 string")


def optional_text(value: Any, field: str, limit: int) -> str:
    """A string, or "" where there is none."""
    return "" if value is None else parse_text(value, field, limit)


def parse_text(value: Any, field: str, limit: int) -> str:
    """A string of at most `limit` bytes of UTF-8."""
    if type(value) is not str:
        raise bad(field, value, "must be a string")
    if _num_bytes(value, field) > limit:
        raise bad(field, value, f"must have at most {limit} bytes of UTF-8")
    return value


def _num_bytes(value: str, field: str) -> int:
    try:
        return len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise bad(field, value, "is not Unicode text (a lone surrogate): send valid UTF-8") from None
