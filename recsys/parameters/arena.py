"""The serving copy's tables in memory that other processes of this host map: made by the parameter service, read by `shared`.

The memory is an anonymous file (`memfd`), which is gone with its processes; where the system has none, a file beside the snapshots. A
small file in the service's folder says where it is. Whoever writes holds a lock on it for as long as the process lives, however it ends.

The head is a few numbers: a random TOKEN, which tells this memory from any other; BEAT, when the writer last took a turn (monotonic ns);
LEFT, 1 once another memory took its place; CHANGES, odd while a delta is being applied; and the state: EPOCH, STEP, COVERS, DENSE, and
CHECK, by which a reader knows that it saw all four of one state.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.files import replace, seal
from recsys.parameters.base import ParameterState
from recsys.table.base import Layout
from recsys.table.cpu import CpuTable
from recsys.table.tables import Tables
from recsys.types import Int64

VERSION = 1
"""Of how tables lie in memory: a reader of another release asks over gRPC instead."""
ANNOUNCEMENT = "memory.json"
TOKEN, BEAT, LEFT, CHANGES, EPOCH, STEP, COVERS, DENSE, CHECK = range(9)
_GRANULE = mmap.ALLOCATIONGRANULARITY
_FILES = "tables-*.memory"


class Arena:
    """One file of memory from which arrays are given; its pages are used as they are touched."""

    def __init__(self, folder: Path) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("recsys-tables", os.MFD_CLOEXEC)
            os.fchmod(self._fd, 0o600)
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._fd, self.path = tempfile.mkstemp(_FILES.partition("*")[2], _FILES.partition("*")[0], folder)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._end = 0
        self._given: dict[int, int] = {}
        """Offset of each array, by its address."""
        self.head: Int64 = self.room((9,), np.int64)
        self.head[TOKEN] = secrets.randbits(62)

    def room(self, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Zeros of this shape that never move: a `recsys.table.memory.Room`."""
        size = max(1, math.prod(shape) * np.dtype(kind).itemsize)
        start, self._end = self._end, self._end + -(-size // _GRANULE) * _GRANULE
        os.ftruncate(self._fd, self._end)
        array = np.frombuffer(mmap.mmap(self._fd, size, offset=start), kind, math.prod(shape)).reshape(shape)
        self._given[array.ctypes.data] = start
        return array

    def place(self, array: npt.NDArray[Any]) -> dict[str, Any]:
        """Where an array of `room` is, for `shared.mapped`."""
        return {"offset": self._given[array.ctypes.data], "shape": list(array.shape), "kind": array.dtype.str}

    def close(self) -> None:
        """Say that nothing is written here any more. What readers mapped stays theirs."""
        self.head[LEFT] = 1
        os.close(self._fd)
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)


class Sharing:
    """What the parameter service tells processes of its host: where its tables are, and of which state. One writer."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._current: Arena | None = None
        self._next: Arena | None = None
        self._unannounce()

    @property
    def announced(self) -> bool:
        """Whether readers may know of any."""
        return self._current is not None

    def tables(self, layouts: Sequence[Layout]) -> Tables:
        """New tables in memory that nobody knows of before `announce`."""
        if self._next is not None:
            self._next.close()
        self._next = Arena(self._folder)
        return Tables(layouts, "cpu", self._next.room)

    def announce(self, tables: Mapping[str, Any], state: ParameterState) -> None:
        """Let readers find the tables last made, which are of this state; they leave the ones before."""
        if self._next is None:
            self.tell(state)
            return
        before, self._current, self._next = self._current, self._next, None
        self.beat()
        self.tell(state)
        content = {
            "version": VERSION,
            "name": self._name,
            "path": self._current.path,
            "token": int(self._current.head[TOKEN]),
            "head": self._current.place(self._current.head),
            "tables": [self._described(table) for table in tables.values()],
        }
        temporary = self._folder / f"{ANNOUNCEMENT}.tmp"
        temporary.write_bytes(seal(content))
        replace(temporary, self._folder / ANNOUNCEMENT)
        if before is not None:
            before.close()

    def _described(self, table: CpuTable) -> dict[str, Any]:
        assert self._current is not None
        layout, arrays = table.layout, table.shared
        places = {name: self._current.place(array) for name, array in arrays.items()}
        return {"name": layout.name, "slots": sorted(layout.slots), "dim": layout.dim, "arrays": places}

    def tell(self, state: ParameterState) -> None:
        """The rows are of this state now, or newer: called after they are."""
        if self._current is None:
            return
        told = [state.version.epoch, state.version.step, state.covers_ms, state.dense_version]
        self._current.head[EPOCH:] = *told, check(told)

    def count(self, changes: int) -> None:
        """An odd number: a delta is being applied; an even one: all rows are of the state that is told."""
        if self._current is not None:
            self._current.head[CHANGES] = changes

    def beat(self) -> None:
        """The writer takes its turns."""
        if self._current is not None:
            self._current.head[BEAT] = time.monotonic_ns()

    def close(self) -> None:
        """Nothing is shared any more."""
        self._unannounce()
        for arena in (self._current, self._next):
            if arena is not None:
                arena.close()
        self._current = self._next = None

    def _unannounce(self) -> None:
        """Also what a process that was killed left."""
        for path in (self._folder / ANNOUNCEMENT, *self._folder.glob(_FILES)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def check(state: Sequence[int]) -> int:
    """Of EPOCH, STEP, COVERS and DENSE: what fits three of them does not fit another's fourth."""
    return zlib.crc32(np.array(state, np.int64).tobytes())
