"""What is asked of Kafka's brokers besides records."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.errors import KafkaError, NoError, TopicAlreadyExistsError
from kafka.structs import OffsetAndMetadata

from recsys.config import LogConfig
from recsys.errors import LogError, LogTruncated, LogUnavailable
from recsys.streams.kafka_clients import LONGEST_S, MAX_BATCH_BYTES, abandon, bounded, opened
from recsys.types import TOPICS

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_SEGMENT_BYTES = 64 * 2**20
"""Of topic `parameters`, 200 KB/s of which are needed for two snapshots: whole files are dropped, half makes twice as many."""
WATCH_S = 0.5
"""How soon an absent broker is noticed by readers, and how often positions are told to it."""


class Cluster:
    """What is asked of the brokers besides records: topics, bounds, positions. Reconnects by itself."""

    def __init__(self, config: LogConfig) -> None:
        self.servers = config.bootstrap_servers.split(",")
        self.prefix = config.topic_prefix
        self._new_partitions = config.partitions
        self._counts: dict[str, int] = {}
        self._ids: dict[str, str] = {}
        """Of each topic as this process first found it."""
        self._replaced: dict[str, str] = {}
        self._settled: set[str] = set()
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
                    self._admin = opened(KafkaAdminClient, bootstrap_servers=self.servers)
                admin = self._admin
                with bounded("the broker to answer a question", LONGEST_S, lambda: abandon(admin)):
                    return question(admin)
            except (KafkaError, OSError, RuntimeError) as error:
                if self._admin is None:
                    self._retry_at = time.monotonic() + WATCH_S  # one thread tries, the others need not wait in line
                self._drop()
                raise LogUnavailable(
                    f"Kafka at {','.join(self.servers)} does not answer ({error!r}): check `log.bootstrap_servers`"
                ) from error

    def _drop(self) -> None:
        if self._admin is not None:
            abandon(self._admin)
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
            if not self._settled.issuperset(topics):
                self._settle(admin, topics)
            return admin.describe_topics([self.prefix + topic for topic in topics])

        described = {found["name"].removeprefix(self.prefix): found for found in self.ask(make)}
        self._note_ids(described)
        counts = {name: len(found["partitions"]) for name, found in described.items()}
        if counts.get("impression") != counts.get("feedback"):
            raise LogError(
                f"Kafka topics {self.prefix}impression ({counts['impression']} partitions) and {self.prefix}feedback "
                f"({counts['feedback']}) must have the same number: add partitions to the smaller one"
            )
        self._counts.update(counts)

    def _settle(self, admin: Any, topics: Sequence[str]) -> None:
        """Topics that somebody else made, or an earlier release: what is written here relies on these settings."""
        wanted = {self.prefix + topic: self._settings(topic)["configs"] for topic in topics}
        asked = [ConfigResource(ConfigResourceType.TOPIC, name) for name in wanted]
        try:
            found = admin.describe_configs(asked, config_filter="all")["topic"]
            for name, configs in wanted.items():
                now = {key: str(found[name][key]["value"]) for key in configs if key in found[name]}
                changes = {key: value for key, value in configs.items() if now.get(key, value) != value}
                if changes:
                    _log.warning("Kafka topic %s: %s is changed to %s", name, {k: now[k] for k in changes}, changes)
                    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, changes)])
        except (
            KafkaError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # a broker that forbids it: it may be right already
            _log.warning("settings of Kafka's topics could not be compared with %s (%r)", wanted, error)
        self._settled.update(topics)

    def drop_before(self, partition: TopicPartition, offset: int) -> None:
        """Delete the records before an offset."""
        self.ask(lambda admin: admin.delete_records({partition: offset}, timeout_ms=5000))

    def _note_ids(self, described: Mapping[str, Any]) -> None:
        for name, found in described.items():
            now = uuid.UUID(str(found.get("topic_id") or uuid.UUID(int=0)))
            known = self._ids.setdefault(name, f"kafka:{now}" if now.int else "")
            if now.int and known and known != f"kafka:{now}" and name not in self._replaced:
                self._replaced[name] = f"kafka:{now}"
                _log.error(
                    "Kafka topic %s%s was made anew while it was in use: what is read from it is a gap",
                    self.prefix,
                    name,
                )

    def identity(self, topic: str) -> str:
        self.partitions(topic)
        return self._ids[topic]

    def check(self, topic: str) -> None:
        """LogTruncated when the topic is not the one that this process first found."""
        self.partitions(topic)
        if topic in self._replaced:
            raise LogTruncated(
                f"Kafka topic {self.prefix}{topic} was deleted and made anew ({self._ids[topic]} is {self._replaced[topic]} "
                "now): start again with `--accept-gap`"
            )

    def _settings(self, topic: str) -> dict[str, Any]:
        configs = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(MAX_BATCH_BYTES)}
        configs["cleanup.policy"] = "compact" if topic == "item" else "delete"
        if topic == "item":
            configs["min.compaction.lag.ms"] = (
                "3600000"  # a trainer that goes on within the hour reads what it read before
            )
        if topic == "parameters":
            configs["segment.bytes"] = str(_SEGMENT_BYTES)
        partitions = self._new_partitions if topic in ("impression", "feedback") else 1
        return {"num_partitions": partitions, "replication_factor": -1, "configs": configs}

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        def both(admin: Any) -> tuple[int, int]:
            begin, end = (
                admin.list_partition_offsets({partition: spec}, isolation_level="read_committed", timeout_ms=5000)
                for spec in (OffsetSpec.EARLIEST, OffsetSpec.LATEST)
            )
            return begin[partition].offset, end[partition].offset

        return self.ask(both)

    def ends(self, partitions: Sequence[TopicPartition]) -> list[int]:
        """The ends of what is committed."""
        if not partitions:
            return []
        wanted = dict.fromkeys(partitions, OffsetSpec.LATEST)
        found = self.ask(
            lambda admin: admin.list_partition_offsets(wanted, isolation_level="read_committed", timeout_ms=5000)
        )
        return [found[partition].offset for partition in partitions]

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
