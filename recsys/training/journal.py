"""What the clock and polling decided, one line a step, written before the step runs."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

from recsys.clock import bounded_ms
from recsys.files import seal, write_file
from recsys.training import journal_lines
from recsys.types import Record

logger = logging.getLogger("recsys")


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
    wall_ms: int | None = None
    """What the wall clock said: by it, records' times are bounded. None: an earlier version, which did not bound them."""
    made_of: str = ""
    """The configuration of an entry that begins a journal, by `made_of.mark`: from it on, steps are that configuration's."""
    resume: Mapping[str, Any] = field(default_factory=dict)
    """An operator's word to the open breaker: `name`, `how` (learn or skip), and the `ends` to skip to."""

    def leaving_out(self, units: Mapping[str, str]) -> Entry:
        """The same step without these, too."""
        return replace(self, without={**self.without, **units})


def log_ms(record: Record, wall_ms: int | None) -> int:
    """The log time of a record as a step sees it. One that leads the wall clock by more than the bound is as of now: so log time goes
    on, and does not jump ahead of what else is open."""
    if wall_ms is None:
        return record.time_ms
    bounded = bounded_ms(record.time_ms, wall_ms)
    return bounded if bounded >= record.time_ms else wall_ms


class Journal:
    """Append-only files `journal-<first step>.jsonl`, a new one at each checkpoint. Survives kill -9: one write a line."""

    def __init__(self, folder: Path, made_of: str = "") -> None:
        """`made_of`: the configuration that steps are run under (`made_of.mark`); "": any."""
        self._folder, self._made_of = folder, made_of
        self._io: FileIO | None = None

    def begin(self, step: int) -> None:
        """Start the file whose first entry will be `step`."""
        self.close()
        self._io = (self._folder / f"journal-{step:012d}.jsonl").open("ab", buffering=0)

    def append(self, entry: Entry) -> None:
        if entry.starts:
            entry = replace(entry, made_of=self._made_of)
        if self._io is None:
            self.begin(entry.step)
        assert self._io is not None
        size = self._io.tell()
        data = seal(as_json(entry)) + b"\n"
        try:
            if self._io.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._io.name)
        except OSError:
            self._io.truncate(size)  # a torn line in the middle of the file would make the journal unreadable
            raise

    def entries(self, from_step: int) -> Iterator[Entry]:
        """Entries from `from_step` on, up to where another configuration begins; of several for one step the last. A torn last line is a
        step that never ran.

        Where steps are missing or a line cannot be known, the journal ends, loudly: the records of the steps after it are in the
        log, and are learned in new steps.
        """
        found: dict[int, Entry] = {}
        expected, unknown = from_step, None
        for path in self._needed(from_step):
            for line in journal_lines.read(path):
                entry = _entry(line)
                if entry is None:
                    unknown = unknown or (path, line.offset)
                elif entry.step > expected:
                    self._end_at(*(unknown or (path, line.offset)), expected)
                    yield from found.values()
                    return
                else:
                    unknown = None
                    if entry.step >= from_step:
                        if entry.made_of and self._made_of not in ("", entry.made_of):
                            yield from found.values()
                            return
                        found[entry.step] = entry
                        expected = max(expected, entry.step + 1)
        if unknown is not None:
            self._end_at(*unknown, expected)
        yield from found.values()

    def _needed(self, from_step: int) -> list[Path]:
        """Files that may hold steps from `from_step` on."""
        paths = self._files()
        first = max((n for n, (start, _) in enumerate(paths) if start <= from_step), default=0)
        return [path for _, path in paths[first:]]

    def _files(self) -> list[tuple[int, Path]]:
        return sorted((int(p.stem.removeprefix("journal-")), p) for p in self._folder.glob("journal-*.jsonl"))

    def _end_at(self, path: Path, offset: int, step: int) -> None:
        """What cannot be run again is set aside: what is written from now on follows what can."""
        logger.error(
            "the journal is torn or flipped at byte %d of %s: steps from %d on are learned anew, in other steps; what it held is kept in "
            "files *.bad",
            offset,
            path,
            step,
        )
        for _, later in self._files():
            if later.name > path.name:
                later.replace(later.with_suffix(".bad"))
        write_file(path.with_suffix(".bad"), path.read_bytes())
        os.truncate(path, offset)

    def begins_at_first_step(self) -> bool:
        """Whether the steps can be run from the trainer's beginning."""
        return any(start <= 1 for start, _ in self._files())

    def cut(self, before_step: int) -> None:
        """Delete files that hold only steps before `before_step`."""
        starts = self._files()
        for (_, path), (following, _) in zip(starts, starts[1:], strict=False):
            if following <= before_step:
                path.unlink()

    def discard(self) -> None:
        """Delete every entry: the log no longer has the records that they name."""
        self.close()
        for path in self._folder.glob("journal-*.jsonl"):
            path.unlink()

    def trim_torn_tail(self) -> None:
        """Cut a torn last line, so that appending starts on a fresh one; one of which only its end is wrong gets it back."""
        for _, path in self._files()[-1:]:
            data = path.read_bytes()
            _, _, tail = data.rpartition(b"\n")
            kept = next((line + b"\n" for line in (tail, tail[:-1]) if journal_lines.sealed(line)), b"")
            if tail:
                with path.open("r+b") as file:
                    file.truncate(len(data) - len(tail))
                    file.seek(0, os.SEEK_END)
                    file.write(kept)

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
    if entry.made_of:
        line["made_of"] = entry.made_of
    if entry.resume:
        line["resume"] = dict(entry.resume)
    if entry.wall_ms is not None:
        line["wall_ms"] = entry.wall_ms
    return line


def of_json(raw: dict[str, Any]) -> Entry:
    """The entry of a journal's line. KeyError, TypeError, ValueError when it is none."""
    return Entry(
        step=int(raw["step"]),
        now_ms=int(raw["now_ms"]),
        ends=dict(raw["ends"]),
        learn=raw["learn"],
        without=raw.get("without", {}),
        starts=raw.get("starts", {}),
        logs=raw.get("logs", {}),
        wall_ms=raw.get("wall_ms"),
        made_of=raw.get("made_of", ""),
        resume=raw.get("resume", {}),
    )


def _entry(line: journal_lines.Line) -> Entry | None:
    try:
        return None if line.fields is None else of_json(line.fields)
    except (KeyError, TypeError, ValueError):
        return None
