"""What topic `dead_letter` holds of a record that could not be used. A letter fits, however large the record was."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import orjson

from recsys.types import Record

VALUE_BYTES = 512 * 1024
"""Of the record's value: in base64 and with the rest it stays below the MiB that a broker takes."""
_TEXT = 1000


def letter(record: Record, reason: str) -> tuple[str, bytes]:
    """Key and value. The same record gives the same key; `value_bytes` is how long its value was. One that was cut is found again by
    the BLAKE2b-128 of all of it."""
    value = record.value if isinstance(record.value, bytes) else str(record.value).encode("utf-8", "replace")
    body: dict[str, Any] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "time_ms": record.time_ms,
        "reason": _text(reason),
        "key": _text(record.key),
        "value": base64.b64encode(value[:VALUE_BYTES]).decode(),
        "value_bytes": len(value),
    }
    if len(value) > VALUE_BYTES:
        body["value_blake2b"] = hashlib.blake2b(value, digest_size=16).hexdigest()
    return f"{record.topic}/{record.partition}/{record.offset}", orjson.dumps(body)


def _text(text: str) -> str:
    """Its beginning, as UTF-8 can say it."""
    return text[:_TEXT].encode("utf-8", "replace").decode()
