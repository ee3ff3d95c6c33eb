"""The event log on Kafka: appends go to a local spool first, a thread moves them to the broker."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from recsys.clock import Clock
from recsys.config import LogConfig
from recsys.errors import LogError, LogUnavailable
from recsys.streams.base import check_sizes
from recsys.streams.kafka_clients import MAX_BATCH_BYTES, opened
from recsys.streams.kafka_cluster import WATCH_S, Cluster
from recsys.streams.kafka_reader import Reader, mapped
from recsys.streams.spool import Spool, Spooled
from recsys.types import TOPICS, Batch

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 2**20
"""Sent and acknowledged at once: double repeats twice as much after a failure, half waits twice as often."""


class KafkaLog:
    """See EventLog. `spool_folder` belongs to this process alone.

    Log time is the broker's (`LogAppendTime`); partitions are chosen by murmur2 of the key, as any Kafka client does.
    """

    def __init__(self, config: LogConfig, spool_folder: Path, *, clock: Clock) -> None:
        del clock  # the broker stamps the time
        self._cluster = Cluster(config)
        self._readers: dict[tuple[str, int], Reader] = {}
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
        check_sizes(topic, messages)
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

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        self._cluster.check(topic)
        reader = self._reader(topic, partition)
        with reader.lock, mapped():
            records = reader.read(offset, limit)
        if not records and self._away is not None:
            raise LogUnavailable(str(self._away))
        return records

    def _reader(self, topic: str, partition: int) -> Reader:
        with self._lock:
            if self._closing.is_set():
                raise LogError("the event log is closed: open it again")
            if (topic, partition) not in self._readers:
                self._readers[topic, partition] = Reader(self._cluster, topic, partition)
            return self._readers[topic, partition]

    def begin(self, topic: str, partition: int) -> int:
        return self._bounds(topic, partition)[0]

    def end(self, topic: str, partition: int) -> int:
        end = self._bounds(topic, partition)[1]
        self._reader(topic, partition).known_end = end
        return end

    def identity(self, topic: str, partition: int) -> str:
        return self._cluster.identity(topic)

    def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        self._cluster.check(topic)
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
        return opened(
            KafkaProducer,
            bootstrap_servers=self._cluster.servers,
            acks="all",
            enable_idempotence=False,  # without an id of ours it waits for ever after a crash of the broker; consumers drop duplicates
            max_in_flight_requests_per_connection=1,  # so that a repetition is never overtaken
            linger_ms=5,  # flush ends it; without it the first records of a chunk go alone
            batch_size=256 * 1024,
            max_request_size=MAX_BATCH_BYTES,
            max_block_ms=2000,
            delivery_timeout_ms=15_000,
            allow_auto_create_topics=False,
            metrics_enabled=False,
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
        while not self._stopping.wait(WATCH_S):
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
