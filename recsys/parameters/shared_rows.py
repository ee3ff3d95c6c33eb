"""The `Parameters` seam through shared memory: rows read in place from the parameter service's tables, where it is on this host."""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys import metrics
from recsys.errors import ParametersUnavailable, SnapshotCorrupt
from recsys.files import unseal
from recsys.model.layouts import same_parameters
from recsys.model.plan import Block
from recsys.parameters.arena import ANNOUNCEMENT, BEAT, CHANGES, EPOCH, LEFT, TOKEN, VERSION, check
from recsys.parameters.base import Parameters, ParameterState, Reply
from recsys.parameters.deltas import Version
from recsys.streams.base import STUCK_S
from recsys.table.shared_table import NAMES, SharedTable

LOOK_S = 0.1
"""Where there is nothing to read, the announcement is looked for this often."""
PATIENCE_S = 0.001
"""Rows that are being written are read again for this long: a writer is done in microseconds, unless it lost its core."""


class SharedParameters:
    """Parameters of the service that announces them in `folder`; of `remote` while there is none. Thread-safe.

    A service that died or stands still leaves its rows: they are used, and the reply says that nobody keeps them up to date.
    """

    def __init__(self, folder: Path, name: str, remote: Parameters) -> None:
        self._folder, self._name, self._remote = folder, name, remote
        self._view: View | None = None
        self._looked_s = -math.inf

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        view = self._view
        if view is None or view.left:
            view = self._look()
        if view is None:
            return self._remote.lookup(blocks)
        if view.kept():
            return view.lookup(blocks, current=True)
        if view.held():  # a writer that stands still would not answer, either
            return view.lookup(blocks, current=False)
        view = self._look() or view
        if view.kept():
            return view.lookup(blocks, current=True)
        try:  # it may have begun anew and not be able to share
            return self._remote.lookup(blocks)
        except ParametersUnavailable:
            return view.lookup(blocks, current=False)

    def dense(self) -> tuple[int, bytes]:
        return self._remote.dense()

    def _look(self) -> View | None:
        """The view of what is announced now, if that is another memory; else the one there is."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            found = View.announced(self._folder, self._name)
            if found is not None and (self._view is None or found.token != self._view.token):
                self._view = found
            metrics.PARAMETERS_SHARED.set(self._view is not None)
        return self._view


class View:
    """The tables of one announcement, mapped read-only."""

    def __init__(self, content: Mapping[str, Any], fd: int) -> None:
        self._fd, self.token = fd, int(content["token"])
        self._head = mapped(fd, content["head"])
        if int(self._head[TOKEN]) != self.token:
            raise ValueError("another process has the place that is announced")
        self._tables = {
            str(table["name"]): SharedTable(
                table["slots"], int(table["dim"]), {name: mapped(fd, table["arrays"][name]) for name in NAMES}
            )
            for table in content["tables"]
        }
        self._state = ParameterState()

    @classmethod
    def announced(cls, folder: Path, name: str) -> View | None:
        """What the parameter service announces; None when there is nothing, or nothing of this release and configuration."""
        try:
            content = unseal((folder / ANNOUNCEMENT).read_bytes())
            if content.get("version") != VERSION or not same_parameters(str(content["name"]), name):
                return None
            fd = os.open(content["path"], os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, SnapshotCorrupt, KeyError, TypeError, ValueError):
            return None
        try:
            return cls(content, fd)
        except (OSError, KeyError, TypeError, ValueError):  # another process has this number by now
            return None

    def __del__(self) -> None:
        os.close(self._fd)

    @property
    def left(self) -> bool:
        """Whether another memory took its place."""
        return bool(self._head[LEFT])

    def held(self) -> bool:
        """Whether its writer lives: it holds the lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def kept(self) -> bool:
        """Whether its writer lives, and takes its turns."""
        return time.monotonic_ns() - int(self._head[BEAT]) < STUCK_S * 1e9 and not self.left and self.held()

    def lookup(self, blocks: Sequence[Block], *, current: bool) -> Reply:
        """Rows of exactly the state in the reply; of a newer one, too, where the delta that makes it is not applied within a millisecond.
        ParametersUnavailable when a writer stopped amid these very rows."""
        with metrics.LOOKUP_SECONDS.time():
            until_s = time.monotonic() + PATIENCE_S
            while True:
                changes, late = int(self._head[CHANGES]), time.monotonic() > until_s
                if late or changes % 2 == 0:
                    state = self._read_state()
                    read = [self._tables[block.layout].lookup(block.slots, block.keys) for block in blocks]
                    found = [each for each in read if each is not None]
                    if len(found) == len(blocks) and (late or self._head[CHANGES] == changes):
                        break
                if late:
                    raise ParametersUnavailable(
                        "the parameter service stands still amid a change; last known rows are used until it goes on"
                    )
                os.sched_yield()  # its core may be this one
        hits, keys = sum(int(np.count_nonzero(known)) for _, known in found), sum(len(known) for _, known in found)
        metrics.LOOKUP_KEYS.inc(keys)
        metrics.TABLE_FOUND_KEYS.inc(hits)
        metrics.TABLE_MISSING_KEYS.inc(keys - hits)
        return Reply(values=tuple(values for values, _ in found), state=state, current=current)

    def _read_state(self) -> ParameterState:
        """The state that was told last; the one before while another is being told."""
        *told, checked = self._head[EPOCH:].tolist()
        if check(told) == checked:
            epoch, step, covers_ms, dense_version = told
            version = Version(epoch=epoch, step=step)
            self._state = ParameterState(version=version, covers_ms=covers_ms, dense_version=dense_version)
        return self._state


def mapped(fd: int, place: Mapping[str, Any]) -> npt.NDArray[Any]:
    """An array of `Arena.place`, mapped read-only.

    NumPy believes that it may be written, as the kernels that read it were compiled for such arrays; who tries is stopped by the system.
    """
    shape, kind = tuple(place["shape"]), np.dtype(place["kind"])
    size = max(1, math.prod(shape) * kind.itemsize)
    area = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=int(place["offset"]))
    address = np.frombuffer(area, np.uint8).ctypes.data
    buffer = (ctypes.c_byte * size).from_address(address)
    buffer._area = area  # lives as long as the array does
    return np.frombuffer(buffer, kind, math.prod(shape)).reshape(shape)
