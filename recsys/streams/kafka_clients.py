"""Clients of kafka-python: how they are set up, and that nothing stays of one that could not be opened."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from kafka.net.compat import KafkaNetClient

_log = logging.getLogger(__name__)
MAX_BATCH_BYTES = 4 * 2**20
"""Largest batch a topic takes: several records of the largest size, with what surrounds them."""
_NETWORK: dict[str, Any] = {
    "request_timeout_ms": 5000,
    "reconnect_backoff_max_ms": 500,  # the default, 30 s, would be added to every outage
    "retry_backoff_ms": 50,
    "bootstrap_timeout_ms": 1000,
}
_STOP_MS = 2000


def opened(kind: Any, **settings: Any) -> Any:
    """A KafkaAdminClient, KafkaConsumer or KafkaProducer; one that cannot be opened leaves no thread and no socket."""
    made: list[Any] = []

    def net(**configs: Any) -> Any:
        made.append(KafkaNetClient(**configs))
        return made[0]

    try:
        client = kind(kafka_client=net, **_NETWORK, **settings)
    except BaseException:
        for one in made:
            _end(one)
        raise
    client.recsys_net = made[0]
    return client


def abandon(client: Any) -> None:
    """End a client at once, from any thread: whoever waits in it gets an error; its thread and sockets go."""
    if (sender := getattr(client, "_sender", None)) is not None:  # a producer: what it holds is given up
        sender.force_close()
        sender.join(_STOP_MS / 1000)
    _end(client.recsys_net)


def _end(net: Any) -> None:
    """Everything of kafka-python's network side. Its own `close` waits without an end."""
    with contextlib.suppress(Exception):
        net._net.stop(timeout_ms=_STOP_MS)
    with contextlib.suppress(Exception):
        net.close()
