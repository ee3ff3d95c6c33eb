"""Which trainer a delta is of: each start takes the next epoch, above all that the folder and the log know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from recsys.errors import BadInput, LogTruncated
from recsys.parameters.deltas import Version, believable, version_of
from recsys.streams.base import EventLog
from recsys.streams.ranges import read_range

TOPIC = "parameters"
_TAIL, _LONGEST_TAIL = 64, 16_384
"""Of the topic so many records are looked at, and more as long as none of them has a version: of half a megabyte each at most."""
_READ_LIMIT = 8
_AGAIN = 10
"""So often the topic may be shortened while it is looked at."""


def take_epoch(folder: Path, log: EventLog, served: int = 0) -> int:
    """The next epoch, by exclusive create: this fences an older trainer of the folder.

    A folder that was deleted begins above what was published before, which the parameter service would prefer for ever; `served` is
    what that service prefers now, where it was asked: it may have read that long ago.
    """
    epoch = newest_published(log, max(newest_taken(folder), served)) + 1
    while True:
        try:
            (folder / f"epoch-{epoch:08d}").open("x").close()
        except FileExistsError:
            epoch += 1
        else:
            break
    for path in folder.glob("epoch-*"):
        if int(path.name.removeprefix("epoch-")) < epoch:
            path.unlink(missing_ok=True)
    return epoch


def newest_taken(folder: Path) -> int:
    """The newest epoch that a trainer of this folder took; 0: none."""
    names = (path.name for path in folder.glob("epoch-*"))
    return max((int(name.removeprefix("epoch-")) for name in names if re.fullmatch(r"epoch-\d+", name)), default=0)


def newest_published(log: EventLog, known: int) -> int:
    """The newest epoch among the last deltas published that can be believed, or `known` where that is newer."""
    for partition in range(log.partitions(TOPIC)):
        tail, again, found = _TAIL, _AGAIN, False
        while not found and tail <= _LONGEST_TAIL:
            begin, end = log.begin(TOPIC, partition), log.end(TOPIC, partition)
            start = max(begin, end - tail)
            # The parameter service may let go of what its snapshots have since we asked for the beginning.
            try:
                epochs = list(_epochs(log, partition, start, end))
            except LogTruncated:
                if not (again := again - 1):
                    raise
                continue
            for epoch in epochs:
                if believable(Version(epoch=epoch), Version(epoch=known)):
                    known, found = max(known, epoch), True
            found = found or start == begin
            tail *= 4
    return known


def _epochs(log: EventLog, partition: int, start: int, end: int) -> Iterator[int]:
    for batch in read_range(log, f"{TOPIC}/{partition}", start, end, limit=_READ_LIMIT):
        for record in batch:
            if (epoch := _epoch_of(record.value)) is not None:
                yield epoch


def _epoch_of(value: bytes) -> int | None:
    try:
        return version_of(value).epoch
    except BadInput:
        return None
