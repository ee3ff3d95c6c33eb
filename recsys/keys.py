"""Ids to 64-bit keys, and the one mixing function.

A key is an int64 everywhere (numpy, torch, files, wire); only the functions below see uint64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from recsys.types import Int64, UInt8

_HASH_KEY = b"recsys/keys/v1"
KEPT = 2**16
"""Ids whose keys are remembered, 15 MB: an event names its user and item several times over, a request fifty items of a history."""
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@lru_cache(KEPT)
def key_of(public_id: str) -> int:
    """The key of a public id: a canonical decimal int64 is its own key, any other string a keyed 64-bit hash (BLAKE2b).

    The hash is keyed so that nobody can craft two ids that share a row without knowing this code's constant; the key is
    part of the file format and never changes.
    """
    digits = public_id[1:] if public_id[:1] == "-" else public_id
    if digits.isascii() and digits.isdigit() and len(digits) <= 19:
        number = int(public_id)
        if str(number) == public_id and _INT64_MIN <= number <= _INT64_MAX:
            return number
    digest = hashlib.blake2b(public_id.encode("utf-8", "surrogatepass"), digest_size=8, key=_HASH_KEY).digest()
    return int.from_bytes(digest, "little", signed=True)


key_of_once: Callable[[str], int] = key_of.__wrapped__
"""The same of an id that hardly comes again, such as a request's: it is not remembered."""


def mix(keys: Int64 | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014), vectorised: a bijection on 64-bit patterns."""
    x: npt.NDArray[np.uint64] = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def cross(left: Int64, right: Int64) -> Int64:
    """The key of a pair of keys (broadcast): order matters, distinct pairs collide with probability 2^-64."""
    return mix(mix(left) + right.view(np.uint64)).view(np.int64)


def joined(ids: Iterable[str]) -> UInt8:
    """Public ids as one array of UTF-8 with a newline after each: they hold no control characters."""
    return np.frombuffer("".join(i + "\n" for i in ids).encode(), np.uint8)


def split(data: UInt8) -> list[str]:
    """What `joined` joined."""
    return data.tobytes().decode().split("\n")[:-1]
