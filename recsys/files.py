"""Files that are either whole or not there, are known to be whole when they are read, and are written once.

What a process keeps is some files and a manifest that names them with their checksums. The manifest before the newest, and what it
names, stay until the next was written and read back. A file that both name may be written twice, so that one flipped bit ends neither.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import orjson

from recsys.errors import SnapshotCorrupt

BLOCK_BYTES = 2**20
"""Bytes of a file under one CRC-32."""
COPY = ".copy"
_TRUSTED = ("trusted.json", "trusted.previous.json")
_PINNED = "served.json"
_WANTED = "wanted.json"
_PIECE = 4 * 2**20
logger = logging.getLogger("recsys")


def for_owner_alone() -> None:
    """From here on every file and folder that this process and its children make is for its owner alone."""
    os.umask(0o077)


class Written(TypedDict):
    """How a manifest names a file: name in its folder, size, BLAKE2b-128 of all bytes, CRC-32 of each block of 1 MiB."""

    name: str
    bytes: int
    checksum: str
    blocks: NotRequired[list[int]]


def fresh(folder: Path, stem: str, suffix: str) -> Path:
    """A name that was never given before: `stem`, something random, `suffix`."""
    return folder / f"{stem}-{secrets.token_hex(4)}{suffix}"


def write_file(path: Path, data: bytes, *, twice: bool = False) -> Written:
    """Temporary name → fsync → read back → rename → fsync folder. `twice`: and a copy beside it, which `read_file` knows of."""
    for target in (path, copy_of(path)) if twice else (path,):
        temporary = target.with_name(target.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
        sync(temporary)
        _read_back(temporary, data)
        replace(temporary, target)
    return Written(name=path.name, bytes=len(data), checksum=_checksum(data), blocks=_blocks(data))


def copy_of(path: Path) -> Path:
    """Where the copy of a file lies that was written twice."""
    return path.with_name(path.name + COPY)


def replace(temporary: Path, path: Path) -> None:
    """Let a finished file take the place of `path`: fsync → rename → fsync folder."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Until it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_back(path: Path, data: bytes) -> None:
    """OSError unless the disk gives back what was written."""
    view = memoryview(data)
    with path.open("rb", buffering=0) as file:
        forget_cached(file.fileno())
        for start in range(0, len(data), _PIECE):
            if file.read(_PIECE) != view[start : start + _PIECE]:
                raise OSError(errno.EIO, "was read back otherwise than it was written", str(path))


def forget_cached(descriptor: int) -> None:
    """Read what follows from the disk, not from memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_file(path: Path, checksum: str, blocks: Sequence[int] = ()) -> bytes:
    """The bytes that `write_file` wrote; of a file that was written twice, loudly, its copy's, which then takes its place.

    SnapshotCorrupt names the file if it is missing, torn or flipped, and the first bytes that are wrong if `blocks` are given.
    """
    try:
        return _read_whole(path, checksum, blocks)
    except SnapshotCorrupt as error:
        copy = copy_of(path)
        if not copy.exists():
            raise
        data = _read_whole(copy, checksum, blocks)
        logger.error("%s; its copy %r is whole and used", error, copy.name)
        try:
            write_file(path, data)
        except OSError as failed:
            logger.error("%r could not be mended (%s)", str(path), failed)
        return data


def _read_whole(path: Path, checksum: str, blocks: Sequence[int]) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotCorrupt(f"{str(path)!r} is missing: restore it, or delete its folder to start anew") from None
    except OSError as error:
        raise SnapshotCorrupt(f"{str(path)!r} cannot be read ({error.strerror}): restore it") from None
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


def seal(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON, whose last field is the CRC-32 of the others."""
    body = orjson.dumps(fields)
    return body[:-1] + b',"crc":%d}' % zlib.crc32(body)


def unseal(data: bytes) -> dict[str, Any]:
    """The fields that were sealed. ValueError when one bit is another; what was written before there was a seal is believed."""
    fields = orjson.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    if fields.pop("crc", None) is not None and data != seal(fields):
        raise ValueError("its checksum is another one")
    return fields


class Manifests:
    """`<name>.json` of a folder, and `<name>.previous.json`, which it took the place of. One writer."""

    def __init__(self, folder: Path, name: str = "manifest") -> None:
        self.newest, self.previous = folder / f"{name}.json", folder / f"{name}.previous.json"
        self._folder = folder

    def exist(self) -> bool:
        return self.newest.exists() or self.previous.exists()

    def read(self) -> Iterator[dict[str, Any]]:
        """What can be read of them, the newest first. Whoever goes on to the next has no use for the one before: it is set aside."""
        if self.previous.exists() and not self.newest.exists():
            self.previous.replace(self.newest)
        while self.newest.exists():
            try:
                fields = unseal(self.newest.read_bytes())
            except (ValueError, OSError) as error:
                logger.error("%s is torn or flipped (%s)", self.newest, error)
            else:
                yield fields
            if not self.previous.exists():
                return
            logger.error("%s cannot be used: set aside; going on from the one before it", self.newest)
            self.newest.replace(self.newest.with_suffix(".bad"))
            self.previous.replace(self.newest)

    def forget_previous(self) -> None:
        """Where nothing of before may stay."""
        self.previous.unlink(missing_ok=True)

    def look(self) -> Iterator[dict[str, Any]]:
        """The same for whoever reads beside the writer: nothing is set aside."""
        for path in (self.newest, self.previous):
            with contextlib.suppress(ValueError, OSError):
                yield unseal(path.read_bytes())

    def write(self, fields: Mapping[str, Any]) -> None:
        """Sealed and read back; then the newest of before becomes the previous one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data = seal(fields)
        temporary = self.newest.with_name(self.newest.name + ".new")
        write_file(temporary, data)
        if self.newest.exists():
            write_file(self.previous, self.newest.read_bytes())
        replace(temporary, self.newest)

    def values(self, field: str) -> list[Any] | None:
        """A field of both; None when one cannot be read or does not have it."""
        found = list(self.look())
        if len(found) < self.newest.exists() + self.previous.exists() or not all(field in each for each in found):
            return None
        return [each[field] for each in found]

    def sweep(self, *patterns: str, kept: Iterable[Any] = ()) -> None:
        """Delete files of these patterns that neither names, nor what else is `kept`."""
        found = list(self.look())
        if len(found) < self.newest.exists() + self.previous.exists():
            return  # what the unreadable one names may still be of use to whoever mends it
        kept = set().union(*map(_named, [*found, *kept]))
        for path in (found for pattern in patterns for found in self._folder.glob(pattern)):
            if path.name.removesuffix(COPY) not in kept:
                path.unlink(missing_ok=True)


class KeptManifests:
    """Manifests of older checkpoints that stay: what `recsys rollback` goes back to, and the last good one while a model is held back.

    Each is the manifest that it had, in `<trainer's folder>/kept`; nobody deletes the files that are named there. One writer, but for
    `want`."""

    def __init__(self, trainer_folder: Path) -> None:
        self._trainer, self._folder = trainer_folder, trainer_folder / "kept"

    def manifests(self) -> list[dict[str, Any]]:
        """All that can be read, the newest first, each once."""
        found: dict[int, dict[str, Any]] = {}
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
                fields = unseal(path.read_bytes())
                found[int(fields["step"])] = fields
        return [found[step] for step in sorted(found, reverse=True)]

    def keep(self, fields: Mapping[str, Any], most: int, every_ms: float) -> None:
        """Keep a checkpoint that is as far from the newest kept one in log time; of more than `most` the oldest go."""
        paths = sorted(path for path in self._folder.glob("*.json") if path.name not in (*_TRUSTED, _PINNED, _WANTED))
        newest = next((f for f in self.manifests() if self._path(f["step"]) in paths), None)
        if most and (newest is None or abs(fields["covers_ms"] - newest["covers_ms"]) >= every_ms):
            paths.append(self._write(self._path(fields["step"]), fields))
        for path in paths[: max(0, len(paths) - most)]:
            path.unlink(missing_ok=True)

    def trust(self, fields: Mapping[str, Any], far: Callable[[Mapping[str, Any]], bool]) -> None:
        """Keep it, and the one that was kept so before, if it is `far` from that: whatever begins to be wrong before the next one, the
        one before is from before that."""
        newest, previous = (self._folder / name for name in _TRUSTED)
        try:
            last = unseal(newest.read_bytes())
        except (ValueError, OSError):
            last = None
        if last is not None and not far(last):
            return
        if last is not None:
            newest.replace(previous)
        self._write(newest, fields)

    def pin(self, fields: Mapping[str, Any]) -> None:
        """Let this one stay until `unpin`: it is served."""
        self._write(self._folder / _PINNED, fields)

    def unpin(self) -> None:
        (self._folder / _PINNED).unlink(missing_ok=True)

    def want(self, fields: Mapping[str, Any]) -> None:
        """Let this one stay until `unwant`: somebody is about to go back to it. They look afterwards whether files of it went meanwhile."""
        self._write(self._folder / _WANTED, fields)

    def unwant(self) -> None:
        (self._folder / _WANTED).unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """What was kept of later steps is of a past that somebody left."""
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(ValueError, OSError, KeyError):
                if unseal(path.read_bytes())["step"] > step:
                    path.unlink()

    def every(self) -> Iterator[dict[str, Any]]:
        """What one can go back to, the newest first: the two that a restart uses, then those that were kept."""
        seen: set[int] = set()
        for fields in (*Manifests(self._trainer).look(), *self.manifests()):
            if isinstance(step := fields.get("step"), int) and step not in seen:
                seen.add(step)
                yield fields

    def good_before(self, began: Mapping[str, int]) -> list[dict[str, Any]]:
        """The checkpoints that may be served, the newest first: those from before so many labels of each task had been seen, when it began
        to be worse; where there is none, the oldest."""
        good = [fields for fields in self.every() if fields.get("good", True)]
        before = [f for f in good if all(f.get("judged", {}).get(task, 0) <= n for task, n in began.items())]
        return before or good[-1:]

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:012d}.json"

    def _write(self, path: Path, fields: Mapping[str, Any]) -> Path:
        self._folder.mkdir(exist_ok=True)
        write_file(path, seal(fields))
        return path


def _named(fields: Any) -> set[str]:
    """Names of files anywhere in a manifest."""
    if isinstance(fields, Mapping):
        own = {fields["name"]} if isinstance(fields.get("name"), str) else set()
        return own.union(*(_named(value) for value in fields.values()))
    if isinstance(fields, Sequence) and not isinstance(fields, str):
        return set().union(*(_named(value) for value in fields))
    return set()
