"""Files that are either whole or not there, and are known to be whole when they are read."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from recsys.errors import SnapshotCorrupt

BLOCK_BYTES = 2**20
"""Bytes of a file under one CRC-32."""


class Written(TypedDict):
    """How a manifest names a file: name in its folder, size, BLAKE2b-128 of all bytes, CRC-32 of each block of 1 MiB."""

    name: str
    bytes: int
    checksum: str
    blocks: NotRequired[list[int]]


def write_file(path: Path, data: bytes) -> Written:
    """Temporary name → fsync → rename → fsync folder."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
    replace(temporary, path)
    return Written(name=path.name, bytes=len(data), checksum=_checksum(data), blocks=_blocks(data))


def replace(temporary: Path, path: Path) -> None:
    """Let a finished file take the place of `path`: fsync → rename → fsync folder."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path, checksum: str, blocks: Sequence[int] = ()) -> bytes:
    """The bytes that `write_file` wrote. SnapshotCorrupt names the file if it is missing, torn or flipped, and the first bytes
    that are wrong if `blocks` are given."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotCorrupt(f"{str(path)!r} is missing: restore it, or delete its folder to start anew") from None
    if _checksum(data) != checksum:
        found = _blocks(data)
        wrong = next((n for n, block in enumerate(blocks) if n >= len(found) or found[n] != block), None)
        where = "" if wrong is None else f", first between bytes {wrong * BLOCK_BYTES} and {(wrong + 1) * BLOCK_BYTES}"
        raise SnapshotCorrupt(
            f"{str(path)!r} is torn or flipped ({len(data)} bytes{where}): restore it, or delete its folder to start anew"
        )
    return data


def _blocks(data: bytes) -> list[int]:
    view = memoryview(data)
    return [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
