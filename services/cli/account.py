"""The ledger of `recsys audit`: what the log holds, what the trainer says became of it, what waits, what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from recsys.config import Config
from recsys.errors import BadInput, LogTruncated, SnapshotCorrupt, StateUnavailable
from recsys.files import Manifests, read_file
from recsys.parameters.deltas import numbered
from recsys.state.open_state import open_state
from recsys.streams.base import EventLog
from recsys.streams.ranges import read_range
from recsys.training.ledger import CARRIED, DEAD, HELD, waiting_of
from recsys.types import Record

Progress = Callable[[int, int], None]
"""Told how many records were read, and the last one's log time."""
ATTEMPTS = 5


@dataclass(slots=True)
class _Read:
    """What the log holds of one partition before the cut."""

    records: int = 0
    holes: int = 0
    """Offsets without a record."""
    items: int = 0
    begin: int = 0


@dataclass(slots=True)
class _Account:
    partitions: dict[str, dict[str, Any]] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)


def account(config: Config, log: EventLog, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """The ledger as of the trainer's newest checkpoint, which is the cut on a running system.

    Raises SnapshotCorrupt where there is no checkpoint, or one of a version that kept no ledger.
    """
    step, small = _newest(config)
    positions, trainer = small["positions"], small["trainer"]
    if "ledger" not in trainer:
        raise SnapshotCorrupt(
            "the checkpoint was written before there was a ledger: start the trainer, and audit after its next checkpoint"
        )
    found = _Account()
    letters = _letters(log, progress)
    items = 0
    whole = True
    for key, cut in sorted(positions.items()):
        buried = letters.get(key, set())
        read = _read(log, key, trainer["ledger"]["since"].get(key, cut), cut, buried, progress)
        items += read.items
        aged = read.begin > trainer["ledger"]["since"].get(key, cut) or key in trainer["ledger"]["gaps"]
        whole &= not (aged and key.startswith("impression/"))
        _partition(found, key, cut, read, trainer["ledger"], buried)
    labels = _labels(found, trainer, items if whole else None)
    held = _held(found, trainer)
    parameters = _parameters(found, config, log, progress)
    return {
        "ok": not found.why,
        "closes": not found.why,
        "cut": {"step": step, "positions": positions},
        "partitions": found.partitions,
        "labels": labels,
        "held_feedback": held,
        "parameters": parameters,
        "stores": _stores(config),
        "why": found.why,
    }


def _newest(config: Config) -> tuple[int, dict[str, Any]]:
    folder = config.data_dir / "trainer"
    for _ in range(ATTEMPTS):  # a running trainer may replace them meanwhile
        for manifest in Manifests(folder).look():
            try:
                small = orjson.loads(read_file(folder / manifest["small"]["name"], manifest["small"]["checksum"]))
                return int(manifest["step"]), small
            except (SnapshotCorrupt, KeyError, TypeError, ValueError):
                continue
    raise SnapshotCorrupt(f"{folder} has no whole checkpoint yet: a trainer writes one every training.checkpoint_s")


def _read(log: EventLog, key: str, since: int, cut: int, buried: set[int], progress: Progress) -> _Read:
    topic, partition = key.rsplit("/", 1)
    read = _Read(begin=log.begin(topic, int(partition)))
    start = max(read.begin, since)
    for record in _records(log, key, start, cut):
        read.records += 1
        if topic == "impression" and record.offset not in buried:
            read.items += _items(record)
        if read.records % 1000 == 0:
            progress(read.records, record.time_ms)
    read.holes = max(0, cut - start) - read.records
    return read


def _records(log: EventLog, key: str, start: int, end: int) -> Iterator[Record]:
    for batch in read_range(log, key, start, end):
        yield from batch


def _items(record: Record) -> int:
    """Items of an impression that can be read; the trainer's own reading decides which can."""
    from recsys.events.messages import parse_impression

    try:
        return len(parse_impression(record.value).items)
    except BadInput:
        return 0


def _letters(log: EventLog, progress: Progress) -> dict[str, set[int]]:
    """Offsets of each partition whose records are in the dead letters."""
    found: dict[str, set[int]] = {}
    for partition in range(log.partitions("dead_letter")):
        begin, end = log.begin("dead_letter", partition), log.end("dead_letter", partition)
        for number, record in enumerate(_records(log, f"dead_letter/{partition}", begin, end)):
            place, _, offset = record.key.rpartition("/")
            if offset.lstrip("-").isdigit():
                found.setdefault(place, set()).add(int(offset))
            if number % 1000 == 0:
                progress(number, record.time_ms)
    return found


def _partition(found: _Account, key: str, cut: int, read: _Read, ledger: Mapping[str, Any], letters: set[int]) -> None:
    outcomes = ledger["records"].get(key, {})
    since, taken = ledger["since"].get(key, cut), sum(outcomes.values())
    aged = max(0, read.begin - since)
    compacted = read.holes if key.startswith("item/") else 0
    accepted = read.records + aged + compacted
    """Offsets that retention and compaction dropped held a record each, but for markers of transactions."""
    why = []
    if not (read.records <= taken <= accepted if aged or compacted else taken == accepted):
        why.append(f"the log holds {accepted} records since offset {since}, the trainer took {taken}")
    missing = outcomes.get(DEAD, 0) - len([offset for offset in letters if since <= offset < cut])
    if missing > 0 and not aged:
        why.append(f"{missing} dead letters of it are missing")
    found.partitions[key] = {
        "accepted": accepted,
        "taken": taken,
        "learned": outcomes.get("joined", 0) + outcomes.get("impression_opened", 0) + outcomes.get("item", 0),
        "waiting": outcomes.get(HELD, 0),
        "late": outcomes.get("too_late", 0),
        "duplicate": outcomes.get("duplicate", 0) + outcomes.get("impression_duplicate", 0),
        "dead_lettered": outcomes.get(DEAD, 0),
        "gap": ledger["gaps"].get(key, 0),
        "outcomes": outcomes,
        "since": since,
        "aged_out": aged + compacted,
        "closes": not why,
    }
    found.why += [f"{key}: {one}" for one in why]


def _labels(found: _Account, trainer: Mapping[str, Any], items: int | None) -> dict[str, dict[str, Any]]:
    """Every label of an opened impression is learned, masked, given up or waits; the joiner says what waits."""
    ledger, result = trainer["ledger"], {}
    if items is not None and items != ledger["items"]:
        found.why.append(
            f"impression: the log's impressions have {items} items, the trainer took {ledger['items']}: some were changed"
        )
    for task, counts in ledger["labels"].items():
        waiting = trainer["waiting"]["labels"].get(task, 0)
        closes = waiting_of(counts) == waiting
        result[task] = {**counts, "waiting": waiting, "closes": closes}
        if not closes:
            found.why.append(
                f"impression: {waiting_of(counts)} labels of {task!r} are not accounted for, {waiting} wait for their window"
            )
    return result


def _held(found: _Account, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Feedback ahead of its impression: all that was held waits still or was settled."""
    records, settled = trainer["ledger"]["records"], trainer["ledger"]["settled"]
    held = sum(outcomes.get(HELD, 0) for outcomes in records.values())
    waiting = trainer["waiting"]["held"]
    closes = held == waiting + sum(settled.values())
    if not closes:
        found.why.append(f"feedback: {held} were held, {waiting} wait, {sum(settled.values())} were settled")
    return {"held": held, "waiting": waiting, **{k: n for k, n in settled.items() if k != CARRIED}, "closes": closes}


def _parameters(found: _Account, config: Config, log: EventLog, progress: Progress) -> dict[str, Any]:
    """Deltas are counted by epoch: none is missing between two of the log, and none never came to the serving copy."""
    for left in reversed(range(ATTEMPTS)):
        try:
            seen, wanted = _published(log, progress)
        except LogTruncated:  # the parameter service let go of what its snapshots have since we asked for the beginning
            if not left:
                raise
        else:
            break
    missing = sum(_incomplete(epoch, numbers, wanted) for epoch, numbers in seen.items())
    deltas = len(wanted)
    served = next(iter(Manifests(config.data_dir / "parameter").look()), {}).get("counted", {})
    if missing:
        found.why.append(f"parameters/0: {missing} deltas are missing from the log")
    if served.get("missed"):
        found.why.append(f"parameters/0: {served['missed']} deltas never came to the serving copy")
    closes = not missing and not served.get("missed")
    return {"deltas": deltas, "missing": missing, "served": served, "closes": closes}


def _published(log: EventLog, progress: Progress) -> tuple[dict[int, dict[int, set[int]]], dict[tuple[int, int], int]]:
    """Chunks by epoch and number of their delta, and how many each delta has."""
    seen: dict[int, dict[int, set[int]]] = {}
    wanted: dict[tuple[int, int], int] = {}
    begin, end = log.begin("parameters", 0), log.end("parameters", 0)
    for count, record in enumerate(_records(log, "parameters/0", begin, end)):
        if count % 1000 == 0:
            progress(count, record.time_ms)
        try:
            one = numbered(record.value)
        except BadInput:
            continue
        if one.number:
            seen.setdefault(one.version.epoch, {}).setdefault(one.number, set()).add(one.chunk)
            wanted[one.version.epoch, one.number] = one.chunks
    return seen, wanted


def _incomplete(epoch: int, numbers: Mapping[int, set[int]], wanted: Mapping[tuple[int, int], int]) -> int:
    """Deltas of an epoch that are not there whole. Of its first the log may have lost the beginning, its last may be under way."""
    first, last = min(numbers), max(numbers)
    inner = range(first + 1, last)
    return sum(len(numbers.get(number, ())) < wanted.get((epoch, number), 1) for number in inner)


def _stores(config: Config) -> dict[str, Any]:
    """Where user state stands in the log."""
    try:
        store = open_state(config)
    except StateUnavailable as error:
        return {"why": str(error)}
    try:
        return {"user_state": dict(store.positions())}
    except StateUnavailable as error:
        return {"why": str(error)}
    finally:
        store.close()
