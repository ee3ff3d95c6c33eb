"""Saved positions: which log each belongs to, and what becomes of them when that log is another one.

A position is saved with the identity of its log. When the log is another one, or lost what comes after the position, that is a
gap: the reader says so and does not go on, until it is started with `--accept-gap`. Then nothing that the new log holds is skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from recsys import metrics
from recsys.errors import LogTruncated
from recsys.streams.base import EventLog

_log = logging.getLogger("recsys")
_COMPACTED = ("item",)
"""What an early record said, a later one says again: their disappearance is no gap."""
REMEDY = (
    "restore the log; or go on from what is left, with nothing of it skipped: start with `--accept-gap` "
    "(`recsys up --accept-gap`, or `recsys serve SERVICE --accept-gap`)"
)


class Resumed(NamedTuple):
    """Where to go on, by "topic/partition", and what was lost (only with `accept_gap`)."""

    positions: dict[str, int]
    gaps: list[str]


def split(key: str) -> tuple[str, int]:
    """ "topic/partition" as a pair."""
    topic, partition = key.rsplit("/", 1)
    return topic, int(partition)


def keys_of(log: EventLog, topics: Iterable[str]) -> list[str]:
    """Every "topic/partition" of these topics."""
    return [f"{topic}/{partition}" for topic in topics for partition in range(log.partitions(topic))]


def ends(log: EventLog, keys: Iterable[str]) -> dict[str, int]:
    """Where each partition ends now."""
    names = list(keys)
    return dict(zip(names, log.ends([split(name) for name in names]), strict=True))


def identities(log: EventLog, keys: Iterable[str]) -> dict[str, str]:
    """Which log each "topic/partition" is."""
    return {key: log.identity(*split(key)) for key in keys}


def resume(
    log: EventLog,
    consumer: str,
    topics: Iterable[str],
    saved: Mapping[str, int],
    logs: Mapping[str, str],
    *,
    accept_gap: bool,
) -> Resumed:
    """Compare positions with the logs that are there; of a partition without one: its beginning.

    `logs` are the identities saved beside the positions: one that is missing (an earlier release did not write it) is taken for
    the log that is there, and said. Raises LogTruncated, naming every gap and the remedy, unless `accept_gap`.
    """
    keys = keys_of(log, topics)
    found, gaps = dict[str, int](), dict[str, str]()
    for key in keys:
        begin, end = log.begin(*split(key)), log.end(*split(key))
        offset = saved.get(key)
        found[key] = begin if offset is None else offset
        if offset is None:
            continue
        now, before = log.identity(*split(key)), logs.get(key, "")
        if before and now and before != now:
            gaps[key] = f"{key} is another log ({now}) than the one of position {offset} ({before})"
            found[key] = begin
        elif offset > end:
            gaps[key] = f"{key} ends at {end}, before position {offset}"
            found[key] = end
        elif offset < begin:
            found[key] = begin
            if split(key)[0] not in _COMPACTED:
                gaps[key] = f"{key} begins at {begin}, behind position {offset}"
    for key in saved.keys() - set(keys):
        gaps[key] = f"{key} is not there any more"
    unnamed = [key for key in keys if key in saved and key not in logs]
    if unnamed:
        _log.info("%s: an earlier release did not say which log its positions are in: taken for today's", consumer)
    for key, gap in gaps.items():
        metrics.LOG_GAPS.labels(consumer, split(key)[0]).inc()
        _log.error("%s: gap: %s; what is left begins at %s", consumer, gap, found.get(key, "nothing"))
    if gaps and not accept_gap:
        raise gap_of(consumer, gaps.values())
    return Resumed(found, list(gaps.values()))


def gap_of(consumer: str, gaps: Iterable[str]) -> LogTruncated:
    """The error that names these gaps and the remedy."""
    return LogTruncated(f"gap in the log of {consumer}: {'; '.join(gaps)}: {REMEDY}")
