"""Files that are either whole or not there, and are known to be whole when they are read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypedDict

from recsys.errors import SnapshotCorrupt


class Written(TypedDict):
    """How a manifest names a file: name in its folder, size, BLAKE2b-128 of all bytes."""

    name: str
    bytes: int
    checksum: str


def write_file(path: Path, data: bytes) -> Written:
    """Temporary name → fsync → rename → fsync folder."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
    replace(temporary, path)
    return Written(name=path.name, bytes=len(data), checksum=_checksum(data))


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


def read_file(path: Path, checksum: str) -> bytes:
    """The bytes that `write_file` wrote. SnapshotCorrupt names the file if it is missing, torn or flipped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotCorrupt(f"{str(path)!r} is missing: restore it, or delete its folder to start anew") from None
    if _checksum(data) != checksum:
        raise SnapshotCorrupt(
            f"{str(path)!r} is torn or flipped ({len(data)} bytes): restore it, or delete its folder to start anew"
        )
    return data


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
