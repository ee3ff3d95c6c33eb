"""Our three services as processes of the test, each started, killed and asked by name: embedded, or on a real Kafka and Redis."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from recsys import config
from recsys.clock import SystemClock
from recsys.streams.open_log import open_log
from recsys.streams.ranges import read_range
from recsys.testing.servers import Server
from recsys.types import Record
from tests.system.embedded import ROOT, START_S, Embedded, command, environment, wait_for

ORDER = ("parameter", "trainer", "ranking")


def tasks(click_s: float = 4.0, like_s: float = 6.0) -> str:
    """Label windows of seconds. A busy test machine makes answers late, never poor."""
    return (
        f'tasks = [{{ name = "click", types = ["click"], window_s = {click_s} }}, '
        f'{{ name = "like", types = ["like"], window_s = {like_s}, weight = 0.5 }}]\n'
        "ranking.deadline_ms = 10000\n"
    )


def on_servers(kafka: Server, redis: Server, name: str) -> str:
    """The end of a configuration file: Kafka and Redis, with topics and keys of its own, and short label windows."""
    return (
        f'log = {{ kind = "kafka", bootstrap_servers = "127.0.0.1:{kafka.port}", topic_prefix = "{name}-", partitions = 2 }}\n'
        f'state = {{ kind = "redis", url = "redis://127.0.0.1:{redis.port}/0", prefix = "{name}" }}\n{tasks()}'
    )


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Services(Embedded):
    """Parameter, trainer and ranking, without a supervisor: what dies stays dead until the test starts it."""

    def __init__(self, folder: Path, extra: str) -> None:
        super().__init__(folder, extra)
        self.loaded = config.load(self.config, {})
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> Services:
        for name in ORDER:
            self.spawn(name)
        for name in ORDER:
            self.wait_ready(name)
        return self

    def spawn(self, name: str) -> None:
        with self.output_of(name).open("a") as out:
            arguments = command(["serve", name, "--config", self.config])
            self.processes[name] = subprocess.Popen(
                arguments, cwd=ROOT, env=environment(), stdout=out, stderr=out, text=True
            )

    def output_of(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def wait_ready(self, name: str) -> None:
        process = self.processes[name]
        wait_for(lambda: self.ready(name) or process.poll() is not None, f"{name} ready", START_S)
        assert process.poll() is None, self.output_of(name).read_text()

    def kill(self, name: str) -> None:
        """kill -9, and wait until it is gone."""
        self.processes[name].kill()
        self.processes[name].wait()

    def close(self) -> None:
        self.http.close()
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def samples(self, service: str, name: str) -> dict[tuple[str, ...], float]:
        """Samples of one series by the values of its labels, in the order of the labels' names."""
        found = scrape(self.url(service))
        return {tuple(v for _, v in sorted(labels.items())): value for n, labels, value in found if n == name}

    def records(self, topic: str) -> list[Record]:
        """Everything in one topic, by a reader of its own."""
        log = open_log(self.loaded, SystemClock(), "test-reader")
        found: list[Record] = []
        try:
            for partition in range(log.partitions(topic)):
                begin, end = log.begin(topic, partition), log.end(topic, partition)
                for batch in read_range(log, f"{topic}/{partition}", begin, end):
                    found += batch
        finally:
            log.close()
        return found


def scrape(url: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """(series, labels, value) of everything that /metrics of one process exports."""
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10.0).text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
