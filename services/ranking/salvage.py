"""The rows of a batch, read one by one where the body as a whole is no JSON: what is wrong with one row costs no other."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from recsys.errors import BadInput
from recsys.events.messages import shorten

BOM = b"\xef\xbb\xbf"
_MAX_TOKENS = 2_000_000
"""Looked at in a body that is no JSON: about a second of one core. Ten thousand events of 64 context fields have as many."""
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+"?|[\[{]+|[\]}]+|,', re.DOTALL)
"""A string, brackets that open, brackets that close, a comma. A string without end is one, too: else its rest is read once a quote."""


def _integer(digits: str) -> float:
    """As orjson reads it: beyond 64 bits a float."""
    return int(digits) if len(digits) < 20 else float(digits)


_tolerant = json.JSONDecoder(parse_int=_integer)
"""Takes NaN, infinity, numbers of any size and lone surrogates: the rules of fields then name the field they are in."""


def loads(text: bytes | bytearray) -> Any:
    """One JSON value; also one that only the rules of fields may refuse. BadInput where it is no JSON at all."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        why = str(error)
    try:
        # Bytes that are no UTF-8 become lone surrogates.
        return _tolerant.decode(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise BadInput(
            f"{shorten(bytes(text[:200]))} is not JSON ({why}): send one JSON object in UTF-8", field="row"
        ) from None


def split(body: bytes | bytearray, name: str, most: int) -> list[Any] | None:
    """The rows of {name: [...]}, each read by itself: its value, or the BadInput of one that cannot be read.

    None where brackets and strings do not say where a row ends, or where there are more than `most` or too much to look at.
    """
    head = re.match(rb'\s*\{\s*"%s"\s*:\s*\[' % name.encode(), body)
    if head is None:
        return None
    rows: list[bytes | bytearray] = []
    start, depth = head.end(), 0
    for number, token in enumerate(_TOKEN.finditer(body, start)):
        kind, size = body[token.start()], token.end() - token.start()
        if number == _MAX_TOKENS or len(rows) == most:
            return None
        if kind in b"[{":
            depth += size
        elif kind in b"]}":
            if size > depth:
                end = token.start() + depth
                rows.append(body[start:end])
                return [_row(row) for row in rows] if re.fullmatch(rb"\]\s*\}\s*", body[end:]) else None
            depth -= size
        elif kind in b"," and not depth:
            rows.append(body[start : token.start()])
            start = token.end()
    return None


def _row(text: bytes | bytearray) -> Any:
    try:
        return loads(text)
    except BadInput as error:
        return error
