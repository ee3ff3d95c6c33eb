"""Messages that nobody should send, made of valid ones: by a seed, so that what fails once fails again."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

NASTY: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**31,
    2**53 + 1,
    2**62,
    2**64,
    "",
    "x" * 300,
    "\x00",
    "line\nbreak",
    "\u202e",
    [],
    [[]],
    {},
    {"a": {"b": []}},
    ["x"] * 1001,
    [None],
    [{"item_id": "i0", "position": 1}],
    "AAAA",
    "not base64",
)
PACKED = ("features", "bandit")


def mutated(message: bytes, rng: np.random.Generator) -> bytes:
    """The message with one or a few things changed: bytes, fields, values at any depth, or what is packed in base64."""
    how = rng.integers(10)
    if how == 0:
        return _flipped(message, rng)
    if how == 1:
        return message[: rng.integers(len(message))]
    value = json.loads(message)
    packed = [name for name in PACKED if value.get(name)]
    if packed and how < 7:
        name = packed[rng.integers(len(packed))]
        value[name] = base64.b64encode(_repacked(base64.b64decode(value[name]), rng)).decode()
    else:
        for _ in range(rng.integers(1, 4)):
            _change(value, rng)
    return json.dumps(value).encode()


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 4)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def _repacked(data: bytes, rng: np.random.Generator) -> bytes:
    how = rng.integers(6)
    if how == 0:
        return data[: rng.integers(len(data))]
    if how == 1:
        return data + rng.bytes(rng.integers(1, 64))
    if how == 2:  # a count in the head
        changed = bytearray(data)
        changed[rng.integers(min(8, len(data)))] = rng.integers(256)
        return bytes(changed)
    if how == 3:  # one item more or less, as far as the length tells
        size = rng.integers(8, 64) * 8
        return data[:4] + data[4 + size :]
    if how == 4:  # a number that is none, or a huge one
        at = 4 * rng.integers(1, max(2, len(data) // 4))
        return data[:at] + rng.choice([b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff"]) + data[at + 4 :]
    return _flipped(data, rng)


def _change(value: Any, rng: np.random.Generator) -> None:
    """Replace, drop, add or double something somewhere in a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = keys[rng.integers(len(keys))]
        if isinstance(value[key], dict | list) and value[key] and rng.integers(3):
            value = value[key]
            continue
        how = rng.integers(5)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, list):
            value.append(value[key])
        elif how == 2 and isinstance(value, dict):
            value[str(rng.integers(100))] = value[key]
        else:
            value[key] = NASTY[rng.integers(len(NASTY))]
        return
