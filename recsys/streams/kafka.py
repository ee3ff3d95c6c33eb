"""The event log on Kafka: appends go to a local spool first, a thread moves them to the broker."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import (
    IllegalStateError,
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    NoError,
    OffsetOutOfRangeError,
    TopicAlreadyExistsError,
)
from kafka.structs import OffsetAndMetadata

from recsys.clock import Clock
from recsys.config import LogConfig
from recsys.errors import LogError, LogTruncated, LogUnavailable
from recsys.streams.spool import Spool, Spooled
from recsys.types import TOPICS, Record

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_VALUE_BYTES = 2**20
_MAX_BATCH_BYTES = 4 * 2**20
"""Largest batch a topic takes: several records of the largest size, with what surrounds them."""
_CHUNK_BYTES = 2**20
"""Sent and acknowledged at once: double repeats twice as much after a failure, half waits twice as often."""
_POLL_MS = 5
_FETCH_MS = 1000
"""Wait for records that are known to be there."""
_WATCH_S = 0.5
"""How soon an absent broker is noticed by readers, and how often positions are told to it."""
_NETWORK: dict[str, Any] = {
    "request_timeout_ms": 5000,
    "reconnect_backoff_max_ms": 500,  # the default, 30 s, would be added to every outage
    "retry_backoff_ms": 50,
    "bootstrap_timeout_ms": 1000,
}


class _Reader:
    """One partition: a consumer that stands where the last read ended."""

    def __init__(self, cluster: _Cluster, topic: str, partition: int) -> None:
        self.lock = threading.Lock()
        self._cluster = cluster
        self._topic = topic
        self._partition = TopicPartition(cluster.prefix + topic, partition)
        self._consumer: Any = None
        self._next = -1
        self._known_end = 0

    def read(self, offset: int, limit: int) -> list[Record]:
        if offset != self._next:
            self._seek(offset)
        self._known_end = max(self._known_end, self._consumer.highwater(self._partition) or 0)
        wait_ms = _FETCH_MS if offset < self._known_end else _POLL_MS
        try:
            found = self._consumer.poll(timeout_ms=wait_ms, max_records=limit).get(self._partition, [])
        except (OffsetOutOfRangeError, LogTruncationError):
            self._next = -1
            self._seek(offset)  # names the bounds
            raise LogTruncated(
                f"{self._topic}/{self._partition.partition}: the broker lost records at {offset}: `--accept-gap`"
            ) from None
        if found:
            self._next = found[-1].offset + 1
        return [
            Record(
                topic=self._topic,
                partition=raw.partition,
                offset=raw.offset,
                key=(raw.key or b"").decode("utf-8", "replace"),
                value=raw.value or b"",
                time_ms=raw.timestamp,
            )
            for raw in found
        ]

    def _seek(self, offset: int) -> None:
        begin, end = self._cluster.bounds(self._partition)
        if not begin <= offset <= end:
            raise LogTruncated(
                f"{self._topic}/{self._partition.partition}: offset {offset} is outside {begin}..{end}: "
                "restore the topic, or go on behind the gap with `--accept-gap`"
            )
        if self._consumer is None:
            self._consumer = KafkaConsumer(
                bootstrap_servers=self._cluster.servers,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                fetch_max_wait_ms=100,
                max_partition_fetch_bytes=_MAX_BATCH_BYTES,
                allow_auto_create_topics=False,
                metrics_enabled=False,
                **_NETWORK,
            )
            self._consumer.assign([self._partition])
        self._consumer.seek(self._partition, offset)
        self._next, self._known_end = offset, end

    def close(self) -> None:
        with self.lock:
            if self._consumer is not None:
                self._consumer.close(autocommit=False, timeout_ms=500)


class _Cluster:
    """What is asked of the brokers besides records: topics, bounds, positions. Reconnects by itself."""

    def __init__(self, config: LogConfig) -> None:
        self.servers = config.bootstrap_servers.split(",")
        self.prefix = config.topic_prefix
        self._new_partitions = config.partitions
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._admin: Any = None
        self._retry_at = 0.0

    def ask(self, question: Callable[[Any], _T]) -> _T:
        with self._lock:
            if time.monotonic() < self._retry_at:
                raise LogUnavailable(
                    f"Kafka at {','.join(self.servers)} cannot be reached: check `log.bootstrap_servers`"
                )
            try:
                if self._admin is None:
                    self._admin = KafkaAdminClient(bootstrap_servers=self.servers, **_NETWORK)
                return question(self._admin)
            except (KafkaError, OSError) as error:
                if self._admin is None:
                    self._retry_at = time.monotonic() + _WATCH_S  # one thread tries, the others need not wait in line
                self._drop()
                raise LogUnavailable(
                    f"Kafka at {','.join(self.servers)} does not answer ({error!r}): check `log.bootstrap_servers`"
                ) from error

    def _drop(self) -> None:
        if self._admin is not None:
            with contextlib.suppress(KafkaError, OSError):
                self._admin.close()
            self._admin = None

    def partitions(self, topic: str) -> int:
        if topic not in self._counts:
            self.create(TOPICS if topic in TOPICS else (topic,))
        return self._counts[topic]

    def create(self, topics: Sequence[str]) -> None:
        """Create those that are missing and remember how many partitions each has."""
        missing = {self.prefix + topic: self._settings(topic) for topic in topics}

        def make(admin: Any) -> list[dict[str, Any]]:
            for existing in admin.list_topics():
                missing.pop(existing, None)
            if missing:
                with contextlib.suppress(TopicAlreadyExistsError):  # another process was first
                    admin.create_topics(missing, timeout_ms=5000)
                admin.wait_for_topics(list(missing), timeout_ms=5000)
            return admin.describe_topics([self.prefix + topic for topic in topics])

        counts = {found["name"].removeprefix(self.prefix): len(found["partitions"]) for found in self.ask(make)}
        if counts.get("impression") != counts.get("feedback"):
            raise LogError(
                f"Kafka topics {self.prefix}impression ({counts['impression']} partitions) and {self.prefix}feedback "
                f"({counts['feedback']}) must have the same number: add partitions to the smaller one"
            )
        self._counts.update(counts)

    def _settings(self, topic: str) -> dict[str, Any]:
        configs = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(_MAX_BATCH_BYTES)}
        if topic == "item":
            configs["cleanup.policy"] = "compact"
        partitions = self._new_partitions if topic in ("impression", "feedback") else 1
        return {"num_partitions": partitions, "replication_factor": -1, "configs": configs}

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        def both(admin: Any) -> tuple[int, int]:
            begin, end = (
                admin.list_partition_offsets({partition: spec}, timeout_ms=5000)
                for spec in (OffsetSpec.EARLIEST, OffsetSpec.LATEST)
            )
            return begin[partition].offset, end[partition].offset

        return self.ask(both)

    def tell(self, group: str, partition: TopicPartition, offset: int) -> None:
        """Commit the group's position; LogUnavailable when the broker refuses it."""
        answer = self.ask(
            lambda admin: admin.alter_group_offsets(group, {partition: OffsetAndMetadata(offset, "", None)})
        )
        if (refusal := answer[partition]) is not NoError:
            raise LogUnavailable(f"Kafka did not take the position of group {group!r} ({refusal.__name__})")

    def close(self) -> None:
        with self._lock:
            self._drop()


class KafkaLog:
    """See EventLog. `spool_folder` belongs to this process alone.

    Log time is the broker's (`LogAppendTime`); partitions are chosen by murmur2 of the key, as any Kafka client does.
    """

    def __init__(self, config: LogConfig, spool_folder: Path, *, clock: Clock) -> None:
        del clock  # the broker stamps the time
        self._cluster = _Cluster(config)
        self._readers: dict[tuple[str, int], _Reader] = {}
        self._lock = threading.Lock()
        self._positions: dict[tuple[str, TopicPartition], int] = {}
        self._closing = threading.Event()  # callers are refused
        self._stopping = threading.Event()  # threads end
        self._away: LogError | None = None
        try:
            self._cluster.create(TOPICS)
        except LogUnavailable as error:
            _log.warning("starting without the broker: %s", error)
            self._away = error
        except LogError:
            self._cluster.close()
            raise
        self._spool = Spool(spool_folder, config.spool_bytes)
        self._threads = [
            threading.Thread(target=target, name=f"log-{target.__name__.strip('_')}", daemon=True)
            for target in (self._send, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        for key, value in messages:
            if len(value) > MAX_VALUE_BYTES:
                raise ValueError(
                    f"message {key!r} for {topic!r} has {len(value)} bytes, more than {MAX_VALUE_BYTES}: split it"
                )
        if self._closing.is_set():
            raise LogError("the event log is closed: open it again")
        self._spool.append(topic, messages)

    @property
    def spool_bytes(self) -> int:
        """Bytes accepted that the broker has not acknowledged."""
        return self._spool.end - self._spool.sent

    def flush(self, timeout_s: float = 10.0) -> None:
        if not self._spool.wait_sent(self._spool.end, timeout_s):
            waiting = self._spool.end - self._spool.sent
            raise self._away or LogUnavailable(
                f"{waiting} bytes of the spool were not sent in {timeout_s} s: check the broker"
            )

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> list[Record]:
        self._cluster.partitions(topic)
        reader = self._reader(topic, partition)
        with reader.lock, _mapped():
            records = reader.read(offset, limit)
        if not records and self._away is not None:
            raise LogUnavailable(str(self._away))
        return records

    def _reader(self, topic: str, partition: int) -> _Reader:
        with self._lock:
            if self._closing.is_set():
                raise LogError("the event log is closed: open it again")
            if (topic, partition) not in self._readers:
                self._readers[topic, partition] = _Reader(self._cluster, topic, partition)
            return self._readers[topic, partition]

    def begin(self, topic: str, partition: int) -> int:
        return self._bounds(topic, partition)[0]

    def end(self, topic: str, partition: int) -> int:
        return self._bounds(topic, partition)[1]

    def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        self._cluster.partitions(topic)
        return self._cluster.bounds(TopicPartition(self._cluster.prefix + topic, partition))

    def partitions(self, topic: str) -> int:
        return self._cluster.partitions(topic)

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        with self._lock:
            self._positions[group, TopicPartition(self._cluster.prefix + topic, partition)] = offset

    def close(self) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            readers = list(self._readers.values())
            self._closing.set()
        self._spool.wait_sent(self._spool.end, 1.0 if self._away is None else 0.0)
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        for reader in readers:
            reader.close()
        self._spool.close()
        self._cluster.close()

    def _send(self) -> None:
        """Move the spool to the broker: a chunk is repeated until all of it is acknowledged."""
        producer: Any = None
        failing = False
        while True:
            position = self._spool.sent
            if not self._spool.wait_appended(position, 0.1):
                if self._stopping.is_set():
                    break
                continue
            try:
                chunk = self._spool.read(position, _CHUNK_BYTES)
                for topic in {message.topic for message in chunk}:
                    self._cluster.partitions(topic)
                producer = producer or self._producer()
                self._send_chunk(producer, chunk)
                self._spool.acknowledge(chunk[-1].next)
                failing = False
            except (KafkaError, LogError, OSError) as error:
                (_log.debug if failing else _log.warning)("the spool waits for the broker: %s", error)
                failing = True
                if self._stopping.wait(0.2):
                    break
        if producer is not None:
            with contextlib.suppress(KafkaError):
                producer.close(timeout=0 if failing else 5)

    def _producer(self) -> Any:
        return KafkaProducer(
            bootstrap_servers=self._cluster.servers,
            acks="all",
            linger_ms=5,  # flush ends it; without it the first records of a chunk go alone
            batch_size=256 * 1024,
            max_request_size=_MAX_BATCH_BYTES,
            max_block_ms=2000,
            delivery_timeout_ms=15_000,
            allow_auto_create_topics=False,
            metrics_enabled=False,
            **_NETWORK,
        )

    def _send_chunk(self, producer: Any, chunk: list[Spooled]) -> None:
        prefix = self._cluster.prefix
        futures = []
        try:
            for message in chunk:
                futures.append(producer.send(prefix + message.topic, key=message.key.encode(), value=message.value))
        finally:
            # Each is acknowledged or given up before any is repeated, so that a repetition is never overtaken.
            flushed = False
            while not flushed and not self._stopping.is_set():
                with contextlib.suppress(KafkaTimeoutError):
                    producer.flush(timeout=0.5)
                    flushed = True
        for future in futures:
            future.get(timeout=0)

    def _watch(self) -> None:
        """Notice whether the broker answers, and tell it the committed positions."""
        told: dict[tuple[str, TopicPartition], int] = {}
        while not self._stopping.wait(_WATCH_S):
            try:
                self._cluster.create(TOPICS)
                self._away = None
            except LogError as error:
                self._away = error
                continue
            with self._lock:
                news = {name: offset for name, offset in self._positions.items() if told.get(name) != offset}
            for (group, partition), offset in news.items():
                with contextlib.suppress(LogUnavailable):  # told again after the next commit or look
                    self._cluster.tell(group, partition, offset)
                    told[group, partition] = offset


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (KafkaError, IllegalStateError, OSError) as error:
        raise LogUnavailable(f"Kafka cannot be read ({error!r}): check `log.bootstrap_servers`") from error
