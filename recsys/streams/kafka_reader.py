"""Reading one partition of Kafka."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import IllegalStateError, KafkaError, LogTruncationError, OffsetOutOfRangeError

from recsys.errors import LogTruncated, LogUnavailable
from recsys.streams.kafka_clients import LONGEST_S, MAX_BATCH_BYTES, abandon, bounded, opened
from recsys.streams.kafka_cluster import Cluster
from recsys.types import Batch, Record

_POLL_MS = 5
_FETCH_MS = 1000
"""Wait for records that are known to be there."""


class Reader:
    """One partition: a consumer that stands where the last read ended."""

    def __init__(self, cluster: Cluster, topic: str, partition: int) -> None:
        self.lock = threading.Lock()
        self._cluster = cluster
        self._topic = topic
        self.partition = TopicPartition(cluster.prefix + topic, partition)
        self._consumer: Any = None
        self._next = -1
        self.known_end = 0
        """What was last heard of the end of what is committed, by who wants all up to there."""
        self.end = 0
        """What the log's watcher heard of it."""
        self._starved_s = 0.0, 0.0
        """First and last read that found nothing since one found something."""

    @property
    def name(self) -> str:
        return f"{self._topic}/{self.partition.partition}"

    @property
    def starved_s(self) -> float:
        """Seconds over which reads found nothing although there is something; of a reader that nobody asks they do not grow."""
        return self._starved_s[1] - self._starved_s[0]

    def read(self, offset: int, limit: int) -> Batch:
        if offset != self._next:
            self._seek(offset)
        self._next = -1  # what fails on the way is read again from `offset`
        try:
            found, after = self._poll(offset, limit)
        except (OffsetOutOfRangeError, LogTruncationError):
            self._seek(offset)  # names the bounds
            raise LogTruncated(f"{self.name}: the broker lost records at {offset}: `--accept-gap`") from None
        except (KafkaError, OSError, RuntimeError):
            self._drop()
            raise
        self._next = after
        if after == offset < self.end:
            self._starved_s = self._starved_s[0] or time.monotonic(), time.monotonic()
        else:
            self._starved_s = 0.0, 0.0
        records = (
            Record(
                topic=self._topic,
                partition=raw.partition,
                offset=raw.offset,
                key=(raw.key or b"").decode("utf-8", "replace"),
                value=raw.value or b"",
                time_ms=raw.timestamp,
            )
            for raw in found
        )
        return Batch(records, after)

    def _poll(self, offset: int, limit: int) -> tuple[list[Any], int]:
        consumer, until_s = self._consumer, time.monotonic() + _FETCH_MS / 1000
        with bounded("records of a broker", LONGEST_S, lambda: abandon(consumer)):
            while True:
                found = consumer.poll(timeout_ms=_POLL_MS, max_records=limit).get(self.partition, [])
                # The consumer's own position: it passes the markers of transactions, and records that were taken back.
                after = consumer.position(self.partition, timeout_ms=_FETCH_MS) or offset
                if after > offset or offset >= self.known_end or time.monotonic() > until_s:
                    return found, after

    def _seek(self, offset: int) -> None:
        begin, end = self._cluster.bounds(self.partition)
        if not begin <= offset <= end:
            raise LogTruncated(
                f"{self.name}: offset {offset} is outside {begin}..{end}: "
                "restore the topic, or go on behind the gap with `--accept-gap`"
            )
        if self._consumer is None:
            self._consumer = opened(
                KafkaConsumer,
                bootstrap_servers=self._cluster.servers,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                fetch_max_wait_ms=500,
                max_partition_fetch_bytes=MAX_BATCH_BYTES,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
            self._consumer.assign([self.partition])
        self._consumer.seek(self.partition, offset)
        self._next, self.known_end = offset, end

    def close(self) -> None:
        with self.lock:
            self._drop()

    def _drop(self) -> None:
        if self._consumer is not None:
            abandon(self._consumer)
            self._consumer = None


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    try:
        yield
    except (KafkaError, IllegalStateError, OSError, RuntimeError) as error:
        raise LogUnavailable(f"Kafka cannot be read ({error!r}): check `log.bootstrap_servers`") from error
