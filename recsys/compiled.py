"""How loops become machine code: Numba, no GIL, kept on disk between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numba

TURN_S, PAUSE_S = 20.0, 0.05
"""Twice what the slowest kernels take: half would compile them twice on a busy machine, double keeps a start waiting for nothing."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call with these options of `numba.njit`."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache is writable: compile in each process
        return numba.njit(nogil=True, **options)(function)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Processes that start together take turns with the kernels of this name: the first compiles, the others read what it kept. One
    whose turn does not come in time (the first may be stopped) goes on without."""
    with contextlib.ExitStack() as turn:
        with contextlib.suppress(OSError):
            lock = turn.enter_context((Path(tempfile.gettempdir()) / f"recsys-{name}-{os.getuid()}.lock").open("a"))
            deadline = time.monotonic() + TURN_S
            while not _locked(lock) and time.monotonic() < deadline:
                time.sleep(PAUSE_S)
        yield


def _locked(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
