"""Moving the spool to the broker."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, RecordListTooLargeError

from recsys import metrics
from recsys.errors import LogError
from recsys.streams.kafka_clients import MAX_BATCH_BYTES, abandon, bounded, opened
from recsys.streams.kafka_cluster import Cluster
from recsys.streams.spool import Spool, Spooled

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 2**20
"""Sent and acknowledged at once: double repeats twice as much after a failure, half waits twice as often."""
_DELIVERY_MS = 15_000
"""A record is given up, and sent again, after so long: half would repeat what a slow broker has already taken."""
_PATIENCE_S = 20.0
"""A chunk for which the producer says nothing for so long: it is ended and another is made. Longer than `_DELIVERY_MS`."""
_AGAIN_S = 0.2
_REFUSED = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What the broker says of a record that it will never take."""


class Sender:
    """The thread that sends: a chunk is repeated until all of it is acknowledged, by a producer that is made anew after any failure."""

    def __init__(self, spool: Spool, cluster: Cluster) -> None:
        self._spool, self._cluster = spool, cluster
        self._stopping = threading.Event()
        self._producer: Any = None
        self.trouble = ""
        """Why the last attempt failed; empty when it did not."""
        self._thread = threading.Thread(target=self._run, name="log-send", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after what is under way; what was not acknowledged stays in the spool."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self._spool.wait_appended(self._spool.sent, 0.1):
                continue
            try:
                self._turn()
                self.trouble = ""
            except Exception as error:  # noqa: BLE001 - this thread must not end: what it does not send reaches nobody
                known = isinstance(error, KafkaError | LogError | OSError)
                level = logging.DEBUG if self.trouble else logging.WARNING
                _log.log(level, "the spool waits for the broker: %r", error, exc_info=None if known else error)
                self.trouble = str(error) or repr(error)
                self._drop()
                self._stopping.wait(_AGAIN_S)
        self._drop()

    def _drop(self) -> None:
        if self._producer is not None:
            abandon(self._producer)
            self._producer = None

    def _turn(self) -> None:
        chunk, behind = self._spool.read(self._spool.sent, _CHUNK_BYTES)
        for topic in {message.topic for message in chunk}:
            self._cluster.partitions(topic)
        if chunk:
            self._producer = self._producer or self._open()
            self._send(self._producer, chunk)
        self._spool.acknowledge(behind)

    def _open(self) -> Any:
        return opened(
            KafkaProducer,
            bootstrap_servers=self._cluster.servers,
            acks="all",
            enable_idempotence=False,  # after a crash of the broker it waits for an id for ever; consumers drop duplicates
            max_in_flight_requests_per_connection=1,  # so that a repetition is never overtaken
            linger_ms=5,  # flush ends it; without it the first records of a chunk go alone
            batch_size=256 * 1024,
            max_request_size=MAX_BATCH_BYTES,
            max_block_ms=2000,
            delivery_timeout_ms=_DELIVERY_MS,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )

    def _send(self, producer: Any, chunk: list[Spooled]) -> None:
        with bounded("the producer that empties the spool", _PATIENCE_S + 10, lambda: abandon(producer)):
            futures = [
                producer.send(self._cluster.prefix + message.topic, key=message.key.encode(), value=message.value)
                for message in chunk
            ]
            until_s = time.monotonic() + _PATIENCE_S
            while not all(future.is_done for future in futures):
                if self._stopping.is_set() or time.monotonic() > until_s:
                    raise KafkaTimeoutError(
                        f"{len(chunk)} records of the spool were not acknowledged: the producer is made anew"
                    )
                with contextlib.suppress(KafkaTimeoutError):
                    producer.flush(timeout=0.5)
        for message, future in zip(chunk, futures, strict=True):
            try:
                future.get(timeout=0)
            except _REFUSED as error:
                self._refuse(message, error)

    def _refuse(self, message: Spooled, error: KafkaError) -> None:
        """One record that the broker never takes must not keep all others: it is set aside."""
        metrics.DEAD_LETTERS.labels(message.topic, "refused").inc()
        where = self._spool.set_aside(message)
        _log.error(
            "the broker refuses a record of %d bytes for topic %r, key %r (%s): it is kept in %s; raise the topic's max.message.bytes",
            len(message.value),
            message.topic,
            message.key[:100],
            error,
            where,
        )
