"""How loops become machine code: Numba, no GIL, kept on disk between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call with these options of `numba.njit`."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache is writable: compile in each process
        return numba.njit(nogil=True, **options)(function)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Processes that start together take turns with the kernels of this name: the first compiles, the others read what it kept."""
    with contextlib.ExitStack() as turn:
        with contextlib.suppress(OSError):
            lock = turn.enter_context((Path(tempfile.gettempdir()) / f"recsys-{name}-{os.getuid()}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
