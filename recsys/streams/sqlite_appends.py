"""The appends of all threads of a process to its embedded log, grouped into commits by one thread."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from recsys.clock import Clock
from recsys.errors import LogError
from recsys.streams.sqlite_file import LogFile

Messages = Sequence[tuple[str, bytes]]
_GROUP_MESSAGES = 20_000
"""Most messages of one commit: about 100 ms, so that one huge append does not keep a click waiting for seconds."""
_Append = tuple[str, Messages, "Future[None]"]


class Appends:
    """What waits to be committed, and the thread that does it. Thread-safe; a forked process has a thread of its own."""

    def __init__(self, commit: Callable[[str, Messages], LogFile], retention_bytes: int, clock: Clock) -> None:
        """`commit` appends to a topic in one commit and returns its file, which is shortened to `retention_bytes` afterwards."""
        self._commit, self._retention_bytes, self._clock = commit, retention_bytes, clock
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._writer.start()

    @property
    def num_waiting(self) -> int:
        """Calls whose commit has not begun, about."""
        return self._queue.qsize()

    def wait(self, topic: str, messages: Messages) -> None:
        """Append, and return once it is committed; raises what the commit raised."""
        done: Future[None] = Future()
        with self._lock:  # nothing may come behind the None of close(): it would wait for ever
            if self._closed:
                raise LogError("the event log is closed: open it again")
            if self._pid != os.getpid():  # forked: threads do not come along
                self._start()
            self._queue.put((topic, messages, done))
        done.result()

    def _write(self) -> None:
        waiting = self._queue
        while (first := waiting.get()) is not None:
            group = [first]
            size = len(first[1])
            while size < _GROUP_MESSAGES and not waiting.empty():
                if (more := waiting.get()) is None:
                    waiting.put(None)
                    break
                group.append(more)
                size += len(more[1])
            for topic in dict.fromkeys(topic for topic, _, _ in group):
                self._commit_group(topic, [append for append in group if append[0] == topic])

    def _commit_group(self, topic: str, group: list[_Append]) -> None:
        messages = group[0][1] if len(group) == 1 else [message for _, part, _ in group for message in part]
        try:
            file = self._commit(topic, messages)
        except Exception as error:  # noqa: BLE001 - handed to the threads that wait, which raise it
            if len(group) > 1 and not isinstance(error, LogError):  # one caller's mistake: only that call fails
                for append in group:
                    self._commit_group(topic, [append])
                return
            for _, _, done in group:
                done.set_exception(error)
            return
        for _, _, done in group:
            done.set_result(None)
        with contextlib.suppress(LogError):  # shortening is tried again; the appends above are safe
            appended = sum(len(key) + len(value) + 20 for key, value in messages)
            file.shorten(appended, self._retention_bytes, self._clock.now_ms())

    def close(self) -> None:
        """Commit what waits, and take no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if self._pid == os.getpid():
            self._writer.join()
