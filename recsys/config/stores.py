"""Options of the event log, of user state and of memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recsys.config.tasks import Section


class LogConfig(Section):
    """The event log."""

    kind: Literal["sqlite", "kafka"] = "sqlite"
    """`sqlite`: one file a topic in the data folder; `kafka`: a broker, with a local spool in the data folder."""
    bootstrap_servers: str = "127.0.0.1:9092"
    """Kafka brokers, host:port, comma-separated."""
    topic_prefix: str = ""
    """Put before each topic's name in Kafka, so that several systems can share a broker."""
    partitions: int = Field(1, ge=1, le=256)
    """Partitions of `impression` and `feedback` when they are created (Kafka)."""
    spool_bytes: int = Field(256 * 2**20, ge=2**16)
    """Bytes of accepted records that may wait for the broker; beyond it feedback answers 503."""
    retention_bytes: int = Field(4 * 2**30, ge=2**20)
    """Bytes kept of each topic of the embedded log once every reader is past them, and of embedded user state."""


class StateConfig(Section):
    """Per-user state."""

    kind: Literal["sqlite", "redis"] = "sqlite"
    """Where user state lives."""
    url: str = "redis://127.0.0.1:6379/0"
    """Redis address."""
    prefix: str = "recsys"
    """Put before each Redis key."""
    history_len: int = Field(50, ge=1, le=1000)
    """Events of each type kept per user."""
    seen_len: int = Field(1000, ge=1, le=100_000)
    """Items last seen kept per user."""


class CapacityConfig(Section):
    """Bounds of what grows: tables, catalogue, counters, held feedback and the rest have shares of one budget."""

    memory_bytes: int = Field(0, ge=0)
    """Bytes that all bounded things of one machine may hold together; 0: half of the machine's memory."""
