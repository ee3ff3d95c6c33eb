"""Messages made wrong by a seeded hand: random bytes, changed valid ones, lengths, huge, forged, nested."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from typing import Any

import orjson

KINDS = ("random", "changed", "lengths", "huge", "forged", "nested")
STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**53 + 1,
    -(2**63),
    2**63 - 1,
    1e308,
    "",
    " ",
    "\x00",
    "a\nb",
    "\u2028",
    "é" * 300,
    "x" * 5000,
    "12.0",
    "NaN",
    "../../etc",
    [],
    {},
    [[]],
    [None],
    {"": ""},
)
MAX_BYTES = 2**20
"""What a log takes: larger ones are refused when they are appended."""


class Mutator:
    """Wrong messages after valid ones; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._ways: dict[str, Callable[[bytes], bytes]] = {
            "random": self._random,
            "changed": self._changed,
            "lengths": self._lengths,
            "huge": self._huge,
            "forged": self._forged,
            "nested": self._nested,
        }

    def make(self, kind: str, valid: bytes) -> bytes:
        """One message of a kind."""
        return self._ways[kind](valid)[:MAX_BYTES]

    def any(self, valid: bytes) -> bytes:
        """One message of any kind; huge ones are rare."""
        return self.make(self._rng.choices(KINDS, (2, 6, 4, 0.02, 6, 0.2))[0], valid)

    def _random(self, valid: bytes) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 7, 64, 512, 4096)))

    def _changed(self, valid: bytes) -> bytes:
        """Bytes flipped, cut out, doubled or put in."""
        data = bytearray(valid)
        for _ in range(self._rng.randint(1, 4)):
            at = self._rng.randrange(len(data) + 1)
            match self._rng.randrange(4):
                case 0 if data:
                    data[at % len(data)] ^= 1 << self._rng.randrange(8)
                case 1:
                    del data[at : at + self._rng.randint(1, 20)]
                case 2:
                    data[at:at] = data[at : at + 30]
                case _:
                    data[at:at] = self._rng.randbytes(self._rng.randint(1, 8))
        return bytes(data)

    def _lengths(self, valid: bytes) -> bytes:
        """Lists and encoded arrays of another length."""

        def change(value: Any) -> Any:
            if isinstance(value, list):
                times = self._rng.choice((0, 1, 2, 3))
                return (value * times)[: self._rng.choice((1, len(value) + 1, 3000))]
            if isinstance(value, str):
                return value[: self._rng.randrange(len(value) + 1)] * self._rng.choice((1, 2, 5))
            return value

        return self._edited(valid, change, str | list)

    def _huge(self, valid: bytes) -> bytes:
        return self._edited(valid, lambda _: "x" * self._rng.choice((100_000, 700_000, 1_040_000)), object)

    def _forged(self, valid: bytes) -> bytes:
        """Well-formed messages that say something else: other types, extreme numbers, changed arrays, missing fields."""

        def change(value: Any) -> Any:
            if isinstance(value, str) and len(value) > 40 and self._rng.random() < 0.7:
                try:
                    return base64.b64encode(self._changed(base64.b64decode(value, validate=True))).decode()
                except ValueError:
                    pass
            return self._rng.choice(STRANGE)

        return self._edited(valid, change, object)

    def _nested(self, valid: bytes) -> bytes:
        deep = self._rng.choice((50, 1000, 20_000))
        opened = self._rng.choice((b"[", b'{"a":'))
        return (
            opened * deep
            if self._rng.random() < 0.5
            else opened * deep + b"1" + (b"]" if opened == b"[" else b"}") * deep
        )

    def _edited(self, valid: bytes, change: Callable[[Any], Any], of: Any) -> bytes:
        """The message with some of its values of these types changed, dropped or renamed; changed bytes where it is no JSON."""
        try:
            message = orjson.loads(valid)
        except orjson.JSONDecodeError:
            return self._changed(valid)
        places = [(where, key) for where, key in _places(message) if isinstance(where[key], of)]
        for where, key in self._rng.sample(places, min(len(places), self._rng.randint(1, 3))):
            if key not in where if isinstance(where, dict) else key >= len(where):
                continue  # it lay in what was changed before
            if isinstance(where, dict) and self._rng.random() < 0.15:
                del where[key]
            else:
                where[key] = change(where[key])
        try:
            return orjson.dumps(message)
        except TypeError:  # an integer beyond 64 bits
            return self._changed(valid)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a message, as container and key; without recursion, for what was nested before may be edited next."""
    found: list[tuple[Any, Any]] = []
    waiting = [value] if isinstance(value, dict | list) else []
    while waiting:
        one = waiting.pop()
        places = [(one, key) for key in (one if isinstance(one, dict) else range(len(one)))]
        found += places
        waiting += [where[key] for where, key in places if isinstance(where[key], dict | list)]
    return found
