"""Lines of a journal file as they were written: each has a checksum, by which one wrong byte is found and put right."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from recsys.files import seal, unseal

LONGEST = 2000
"""Bytes in which one wrong one is looked for: trying all others in its place takes a second."""
logger = logging.getLogger("recsys")


class Line(NamedTuple):
    """One line: where it begins, and its fields; None where they cannot be known."""

    offset: int
    fields: dict[str, Any] | None


def read(path: Path) -> Iterator[Line]:
    """The whole lines of a file: what follows the last end of a line was never finished."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    offset, bad = 0, list[bytes]()
    for line in whole.split(b"\n") if whole else ():
        if (fields := _fields(line)) is None:
            bad.append(line)
        else:
            yield from _mended(path, offset - sum(len(each) + 1 for each in bad), bad)
            bad = []
            yield Line(offset, fields)
        offset += len(line) + 1
    yield from _mended(path, offset - sum(len(each) + 1 for each in bad), bad)


def _fields(line: bytes) -> dict[str, Any] | None:
    try:
        return unseal(line)
    except ValueError:
        return None


def _mended(path: Path, offset: int, lines: list[bytes]) -> Iterator[Line]:
    """Lines that cannot be read, with the one byte put right that is wrong in them; where more is wrong, one that says nothing."""
    if not lines:
        return
    damaged = b"\n".join(lines)
    found = _with_one_byte_changed(damaged) if len(damaged) <= LONGEST else None
    if found is None:
        yield Line(offset, None)
        return
    logger.error("%s: a wrong byte near %d is put right by its line's checksum", path, offset)
    for line in found.split(b"\n"):
        yield Line(offset, _fields(line))
        offset += len(line) + 1


def _with_one_byte_changed(damaged: bytes) -> bytes | None:
    """A checksum of 32 bits fits one of these changes by chance once in ten thousand times; then it must still be the next step's line."""
    for at in range(len(damaged)):
        head, tail = damaged[:at], damaged[at + 1 :]
        for byte in range(256):
            changed = head + bytes((byte,)) + tail
            if all(sealed(line) for line in changed.split(b"\n")):
                return changed
    return None


def sealed(line: bytes) -> bool:
    """Whether it is a line as it was written."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(fields, dict) and fields.pop("crc", None) is not None and bool(fields) and line == seal(fields)
