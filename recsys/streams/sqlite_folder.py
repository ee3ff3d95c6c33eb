"""The folder of the embedded log: each topic's file, opened once, repaired where it is damaged, noticed where it was replaced."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from recsys.errors import LogError, LogFull, LogTruncated
from recsys.streams.sqlite_file import Damaged, LogFile, mapped
from recsys.streams.sqlite_repair import mend, repaired

_log = logging.getLogger(__name__)
LOOK_S = 0.05
"""Whether a file is still the one that readers opened is looked at this often: half asks the system twice as much, and whoever appends
looks in any case."""
_T = TypeVar("_T")


class LogFolder:
    """Thread-safe; a forked process opens its own files."""

    def __init__(self, folder: Path, durable_topics: Sequence[str]) -> None:
        self._folder, self._durable_topics = folder, frozenset(durable_topics)
        self._pid = os.getpid()
        self._files: dict[str, LogFile] = {}
        self._parents_files: dict[str, LogFile] = {}
        self._ids: dict[str, str] = {}
        """Of each topic's file as this process first found it."""
        self._lock = threading.Lock()
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogFull(f"log folder {str(folder)!r} cannot be made ({error}): check `data_dir`") from error
        for path in sorted(folder.glob("*.db")):
            self.file(path.stem)

    def file(self, topic: str) -> LogFile:
        """The topic's file as it is now, made where there is none."""
        with self._lock:
            if self._closed:
                raise LogError("the event log is closed: open it again")
            if self._pid != os.getpid():  # forked: SQLite forbids even closing what the parent opened
                self._pid, self._parents_files, self._files = os.getpid(), self._files, {}
            file = self._files.get(topic)
            if file is None or file.replaced(LOOK_S):
                path = self._folder / f"{topic}.db"
                try:
                    file = self._files[topic] = self._open(topic, path)
                    if self._ids.setdefault(topic, file.id) != file.id:
                        _log.error("log file %s was replaced while it was in use: what is read from it is a gap", path)
                except OSError as error:
                    raise LogFull(f"log file {str(path)!r} cannot be made ({error}): free disk space") from error
            return file

    def _open(self, topic: str, path: Path) -> LogFile:
        if repaired(path).exists():
            mend(path, None)
        try:
            return LogFile(topic, path, topic in self._durable_topics)
        except Damaged as error:
            _log.error("%s: it is repaired, as far as it can be read", error)
            mend(path, path.stat().st_ino)
            return LogFile(topic, path, topic in self._durable_topics)

    def opened(self, topic: str) -> LogFile:
        """The topic's file as it was last opened, without a look whether it still is the one."""
        return self._files[topic]

    def open_again(self, topic: str, damaged: Damaged | None = None) -> LogFile:
        """The topic's file, which was replaced, or which is `damaged` and is repaired."""
        file = self._files[topic]
        if damaged is not None:
            _log.error("%s: it is repaired, as far as it can be read", damaged)
            mend(file.path, file.inode)
        with self._lock:
            file = self._files[topic] = self._open(topic, file.path)
        return file

    def ask(self, topic: str, question: Callable[[LogFile], _T]) -> _T:
        """What the topic's file says; when it is damaged, what it says once it was repaired."""
        file = self._known(topic)
        try:
            with file.lock, mapped(file.path):
                return question(file)
        except Damaged as error:
            _log.error("%s: it is repaired, as far as it can be read", error)
            mend(file.path, file.inode)
        file.replaced()  # looked at now, though it was a moment ago
        file = self._known(topic)
        with file.lock, mapped(file.path):
            return question(file)

    def _known(self, topic: str) -> LogFile:
        """The topic's file for a reader. LogTruncated when it is not the one that this process first found."""
        file = self.file(topic)
        if file.id != self._ids[topic]:
            raise LogTruncated(
                f"log file {str(file.path)!r} was deleted and made anew ({self._ids[topic]} is {file.id} now): restore it, "
                "or start again with `--accept-gap`"
            )
        return file

    def identity(self, topic: str) -> str:
        """The id of the topic's file as this process first found it."""
        self.file(topic)
        return self._ids[topic]

    def close(self) -> None:
        """Close all files. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._pid == os.getpid():
            for file in self._files.values():
                file.close()
