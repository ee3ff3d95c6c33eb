"""The event log on Kafka: appends go to a local spool first, a thread moves them to the broker."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kafka import TopicPartition

from recsys.clock import Clock
from recsys.config import LogConfig
from recsys.errors import LogError, LogUnavailable
from recsys.streams.base import STUCK_S, TRANSIENT, Watch, check_sizes
from recsys.streams.kafka_cluster import WATCH_S, Cluster
from recsys.streams.kafka_reader import Reader, mapped
from recsys.streams.kafka_sender import Sender
from recsys.streams.spool import Spool
from recsys.streams.watch import AskOften
from recsys.types import TOPICS, Batch

_log = logging.getLogger(__name__)


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
        self._heard_s = time.monotonic()
        try:
            self._cluster.create(TOPICS)
        except LogUnavailable as error:
            _log.warning("starting without the broker: %s", error)
            self._away = error
        except LogError:
            self._cluster.close()
            raise
        self._spool = Spool(spool_folder, config.spool_bytes)
        self._sender = Sender(self._spool, self._cluster)
        self._watcher = threading.Thread(target=self._watch, name="log-watch", daemon=True)
        self._watcher.start()

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        check_sizes(topic, messages)
        if self._closing.is_set():
            raise LogError("the event log is closed: open it again")
        self._spool.append(topic, messages)

    def trouble(self) -> str:
        waits_s = self._spool.waits_s
        if waits_s > STUCK_S:
            why = self._sender.trouble or "the broker does not acknowledge them"
            return (
                f"{self._spool.end - self._spool.sent} bytes that were accepted reach nobody for {waits_s:.0f} s: {why}"
            )
        silent_s = time.monotonic() - self._heard_s
        if silent_s > STUCK_S:
            return f"{self._away or 'Kafka does not answer: check `log.bootstrap_servers`'} (for {silent_s:.0f} s)"
        for reader in list(self._readers.values()):
            if (starved_s := reader.starved_s) > STUCK_S:
                return f"{reader.name} gives nothing for {starved_s:.0f} s, and its end is at {reader.end}: see the broker's log"
        return ""

    def flush(self, timeout_s: float = 10.0) -> None:
        if not self._spool.wait_sent(self._spool.end, timeout_s):
            waiting = self._spool.end - self._spool.sent
            raise self._away or LogUnavailable(
                f"{waiting} bytes of the spool were not sent in {timeout_s} s ({self._sender.trouble or 'no answer'}): check the broker"
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
        self._cluster.check(topic)
        return self._cluster.bounds(TopicPartition(self._cluster.prefix + topic, partition))[0]

    def end(self, topic: str, partition: int) -> int:
        return self.ends([(topic, partition)])[0]

    def ends(self, places: Sequence[tuple[str, int]]) -> list[int]:
        for topic in dict.fromkeys(topic for topic, _ in places):
            self._cluster.check(topic)
        found = self._cluster.ends([TopicPartition(self._cluster.prefix + topic, number) for topic, number in places])
        for place, end in zip(places, found, strict=True):
            self._reader(*place).known_end = end
        return found

    def watch(self, topics: Sequence[str]) -> Watch:
        return AskOften()  # the client has its own wait for the broker in every read

    def identity(self, topic: str, partition: int) -> str:
        return self._cluster.identity(topic)

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
        self._sender.close()
        self._watcher.join()
        for reader in readers:
            reader.close()
        self._spool.close()
        self._cluster.close()

    def _look_for_ends(self) -> None:
        """Tell the readers how far they could be."""
        readers = list(self._readers.values())
        for reader, end in zip(readers, self._cluster.ends([r.partition for r in readers]), strict=True):
            reader.end = end

    def _watch(self) -> None:
        """Notice whether the broker answers, and tell it the committed positions."""
        told: dict[tuple[str, TopicPartition], int] = {}
        while not self._stopping.wait(WATCH_S):
            try:
                self._cluster.create(TOPICS)
                self._look_for_ends()
                self._away, self._heard_s = None, time.monotonic()
            except LogError as error:
                self._away = error
                continue
            except Exception as error:  # noqa: BLE001 - this thread must not end: nobody else notices that the broker is back
                _log.error("the broker cannot be watched", exc_info=error)
                self._away = LogUnavailable(f"Kafka cannot be asked ({error!r}): check `log.bootstrap_servers`")
                continue
            with self._lock:
                news = {name: offset for name, offset in self._positions.items() if told.get(name) != offset}
            for (group, partition), offset in news.items():
                with contextlib.suppress(LogUnavailable):  # told again after the next commit or look
                    self._cluster.tell(group, partition, offset)
                    if partition.topic.removeprefix(self._cluster.prefix) in TRANSIENT:
                        self._cluster.drop_before(partition, offset)
                    told[group, partition] = offset
