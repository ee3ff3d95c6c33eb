"""What a system's processes use: CPU time and memory of a process and of all that it and its descendants ever started.

On Linux a process that ended leaves its CPU time to the parent that waited for it. So the sum over the living, of their own
time and of what their ended children left them, has each process once, whether it lives or not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

TRIES, PAUSE_S = 50, 0.02
T = TypeVar("T")


class Family:
    """A process and its descendants, by kind: what `recsys serve KIND` runs, with what it starts itself; the rest is the root's."""

    def __init__(self, root: psutil.Process, name: str = "up") -> None:
        self._root, self._name = root, name

    def members(self) -> dict[str, list[psutil.Process]]:
        """Those that live now; the first of a kind is a service itself."""
        return self._of_each(lambda process: process)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far by each kind, ended processes included."""
        return {kind: sum(found) for kind, found in self._of_each(lambda process: sum(process.cpu_times()[:4])).items()}

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of each kind. What several processes share is in each."""
        return {kind: sum(found) for kind, found in self._of_each(lambda p: int(p.memory_info().rss)).items()}

    def shared_once_bytes(self) -> int:
        """Memory of all together: a page that several map counts a share in each."""
        return sum(sum(found) for found in self._of_each(lambda p: int(p.memory_full_info().pss)).values())

    def _of_each(self, value: Callable[[psutil.Process], T]) -> dict[str, list[T]]:
        """A value of each process, all read while none came or went: else one that ends meanwhile is missed, or there twice."""
        for _ in range(TRIES):
            try:
                before = self._living()
                found: dict[str, list[T]] = {}
                for process, kind in before.items():
                    with contextlib.suppress(psutil.ZombieProcess):  # it holds no memory any more
                        found.setdefault(kind, []).append(value(process))
                if self._living() == before:
                    return found
            except psutil.NoSuchProcess:
                if not self._root.is_running():
                    raise
            time.sleep(PAUSE_S)
        raise RuntimeError(
            f"processes of {self._root.pid} come and go too fast to be counted: look why they are restarted"
        )

    def _living(self) -> dict[psutil.Process, str]:
        """Parents before their children."""
        kinds = {self._root.pid: self._name}
        found = {self._root: self._name}
        for process in self._root.children(recursive=True):
            words = _words(process)
            served = words[words.index("serve") + 1] if "serve" in words[:-1] else ""
            kinds[process.pid] = served or kinds.get(process.ppid(), self._name)
            found[process] = kinds[process.pid]
        return found


def _words(process: psutil.Process) -> list[str]:
    """Its command line; none of one that ended and that its parent has not waited for yet."""
    try:
        return process.cmdline()
    except psutil.ZombieProcess:
        return []
