"""What the clock and polling decided, one line a step, written before the step runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import orjson

from recsys.errors import SnapshotCorrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One step: the end offset of each partition ("topic/partition"), log time, and whether it learned."""

    step: int
    now_ms: int
    ends: dict[str, int]
    learn: bool = True


class Journal:
    """Append-only files `journal-<first step>.jsonl`, a new one at each checkpoint. Survives kill -9: one write a line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._io: FileIO | None = None

    def begin(self, step: int) -> None:
        """Start the file whose first entry will be `step`."""
        self.close()
        self._io = (self._folder / f"journal-{step:012d}.jsonl").open("ab", buffering=0)

    def append(self, entry: Entry) -> None:
        if self._io is None:
            self.begin(entry.step)
        assert self._io is not None
        line = {"step": entry.step, "now_ms": entry.now_ms, "ends": entry.ends, "learn": entry.learn}
        size = self._io.tell()
        data = orjson.dumps(line) + b"\n"
        try:
            if self._io.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._io.name)
        except OSError:
            self._io.truncate(size)  # a torn line in the middle of the file would make the journal unreadable
            raise

    def entries(self, from_step: int) -> Iterator[Entry]:
        """Entries from `from_step` on. A torn last line is a step that never ran; a gap is SnapshotCorrupt."""
        expected = from_step
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], start=1):
                try:
                    raw = orjson.loads(line)
                    entry = Entry(step=raw["step"], now_ms=raw["now_ms"], ends=raw["ends"], learn=raw["learn"])
                except (orjson.JSONDecodeError, KeyError, TypeError):
                    raise SnapshotCorrupt(
                        f"{path.name} line {number} is not a journal entry: restore it, or delete it and all later ones"
                    ) from None
                if entry.step < expected:
                    continue
                if entry.step != expected:
                    raise SnapshotCorrupt(
                        f"{path.name} line {number} is step {entry.step}, expected {expected}: a journal file is missing"
                    )
                yield entry
                expected += 1

    def begins_at_first_step(self) -> bool:
        """Whether the steps can be run from the trainer's beginning."""
        return any(int(p.stem.removeprefix("journal-")) <= 1 for p in self._folder.glob("journal-*.jsonl"))

    def cut(self, before_step: int) -> None:
        """Delete files that hold only steps before `before_step`."""
        starts = sorted((int(p.stem.removeprefix("journal-")), p) for p in self._folder.glob("journal-*.jsonl"))
        for (_, path), (following, _) in zip(starts, starts[1:], strict=False):
            if following <= before_step:
                path.unlink()

    def trim_torn_tail(self) -> None:
        """Cut a torn last line, so that appending starts on a fresh one."""
        paths = sorted(self._folder.glob("journal-*.jsonl"))
        if paths:
            data = paths[-1].read_bytes()
            if data and not data.endswith(b"\n"):
                with paths[-1].open("r+b") as file:
                    file.truncate(data.rfind(b"\n") + 1)

    def close(self) -> None:
        if self._io is not None:
            self._io.close()
            self._io = None
