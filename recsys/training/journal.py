"""What the clock and polling decided, one line a step, written before the step runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from recsys.errors import SnapshotCorrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One step: the end offset of each partition ("topic/partition"), log time, and whether it learned."""

    step: int
    now_ms: int
    ends: dict[str, int]
    learn: bool = True
    without: Mapping[str, str] = field(default_factory=dict)
    """What is left out because the step failed with it, each with the reason: see `recovery`."""
    starts: Mapping[str, int] = field(default_factory=dict)
    """Where each partition's range begins, and (`logs`) in which log: of a first entry that no checkpoint's positions precede."""
    logs: Mapping[str, str] = field(default_factory=dict)

    def leaving_out(self, units: Mapping[str, str]) -> Entry:
        """The same step without these, too."""
        return replace(self, without={**self.without, **units})


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
        size = self._io.tell()
        data = orjson.dumps(as_json(entry)) + b"\n"
        try:
            if self._io.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._io.name)
        except OSError:
            self._io.truncate(size)  # a torn line in the middle of the file would make the journal unreadable
            raise

    def entries(self, from_step: int) -> Iterator[Entry]:
        """Entries from `from_step` on; of several for one step the last. A torn last line is a step that never ran; a gap is
        SnapshotCorrupt."""
        found: dict[int, Entry] = {}
        expected = from_step
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                where = f"{path.name} line {number}"
                entry = _parsed(line, where)
                if entry.step > expected:
                    raise SnapshotCorrupt(
                        f"{where} is step {entry.step}, expected {expected}: a journal file is missing"
                    )
                if entry.step >= from_step:
                    found[entry.step] = entry
                    expected = max(expected, entry.step + 1)
        yield from found.values()

    def begins_at_first_step(self) -> bool:
        """Whether the steps can be run from the trainer's beginning."""
        return any(int(p.stem.removeprefix("journal-")) <= 1 for p in self._folder.glob("journal-*.jsonl"))

    def cut(self, before_step: int) -> None:
        """Delete files that hold only steps before `before_step`."""
        starts = sorted((int(p.stem.removeprefix("journal-")), p) for p in self._folder.glob("journal-*.jsonl"))
        for (_, path), (following, _) in zip(starts, starts[1:], strict=False):
            if following <= before_step:
                path.unlink()

    def discard(self) -> None:
        """Delete every entry: the log no longer has the records that they name."""
        self.close()
        for path in self._folder.glob("journal-*.jsonl"):
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


def as_json(entry: Entry) -> dict[str, Any]:
    """What `of_json` takes: what an entry of before did not know is written only where it says something."""
    line: dict[str, Any] = {"step": entry.step, "now_ms": entry.now_ms, "ends": entry.ends, "learn": entry.learn}
    if entry.without:
        line["without"] = dict(entry.without)
    if entry.starts:
        line |= {"starts": dict(entry.starts), "logs": dict(entry.logs)}
    return line


def of_json(raw: dict[str, Any]) -> Entry:
    """The entry of a journal's line."""
    return Entry(
        step=raw["step"],
        now_ms=raw["now_ms"],
        ends=raw["ends"],
        learn=raw["learn"],
        without=raw.get("without", {}),
        starts=raw.get("starts", {}),
        logs=raw.get("logs", {}),
    )


def _parsed(line: bytes, where: str) -> Entry:
    try:
        return of_json(orjson.loads(line))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise SnapshotCorrupt(f"{where} is not a journal entry: restore it, or delete it and all later ones") from None
