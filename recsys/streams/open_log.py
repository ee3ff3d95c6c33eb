"""Choose the event log that the configuration names."""

from __future__ import annotations

from recsys.clock import Clock
from recsys.config import Config
from recsys.streams.base import EventLog
from recsys.streams.kafka import KafkaLog
from recsys.streams.sqlite_log import SqliteLog


def open_log(config: Config, clock: Clock, name: str) -> EventLog:
    """Open the log for the process `name`: every process needs a name of its own, because with Kafka it owns a spool."""
    if config.log.kind == "kafka":
        return KafkaLog(config.log, config.data_dir / "spool" / name, clock=clock)
    return SqliteLog(config.data_dir / "log", clock=clock, retention_bytes=config.log.retention_bytes)
