"""Waiting for what other processes append: whoever appended touches a file, and the kernel tells those who watch it (inotify)."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from recsys.streams.base import Watch

_log = logging.getLogger(__name__)
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_IN_ATTRIB = 4
POLL_S = 0.005
"""A log that tells nobody is asked this often while something comes: half asks twice as much, double makes everything later by half of it."""

SLOWEST_S = 0.05
"""And this often while nothing comes: half asks twice as often for nothing, double is twice as late with the first event after a pause."""


def touch(descriptor: int) -> None:
    """Tell those who watch an open file. A touch needs no space on a disk; one that fails is made up for by who waits: see `Watch`."""
    with contextlib.suppress(OSError):
        os.utime(descriptor)


def watching(paths: Sequence[Path]) -> Watch:
    """Watch files that are there; where the kernel cannot (no Linux, too many watches), ask often."""
    try:
        return FileWatch(paths)
    except OSError as error:
        _log.warning("%s: files are not watched, the log is asked up to %.0f times a second", error, 1 / POLL_S)
        return AskOften()


class AskOften:
    """See Watch: of a log that tells nobody."""

    tells = False

    def wait(self, timeout_s: float) -> None:
        time.sleep(min(timeout_s, SLOWEST_S))


class FileWatch:
    """See Watch: returns when one of some files was touched. Raises OSError when the kernel cannot tell."""

    tells = True

    def __init__(self, paths: Sequence[Path]) -> None:
        if _LIBC is None:
            raise OSError(f"{sys.platform} has no inotify")
        self._descriptor = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
        # Closed with the last thread that may wait on it, not before: its number might be another file's by then.
        weakref.finalize(self, os.close, self._descriptor)
        for path in paths:
            _checked(_LIBC.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_ATTRIB), f"watching {path}")
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def wait(self, timeout_s: float) -> None:
        if self._poll.poll(timeout_s * 1000):
            with contextlib.suppress(BlockingIOError):
                os.read(self._descriptor, 65536)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
