"""Real servers for tests, on free ports of this machine."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kafka
import kafka.errors
import redis

_KAFKA_CONFIG = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
"""
ports = range(12_000, 32_000)
"""Of which `free_port` gives: below those of outgoing connections, so that none takes it before the server does. Tests that run beside
each other have ranges of their own."""


def free_port() -> int:
    """A TCP port that nobody uses now."""
    while True:
        port = secrets.choice(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _need(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"{program!r} is not installed: apt install {package}")
    return found


class Server:
    """A server process that can be stopped and started again on the same port with the same data."""

    def __init__(self, command: Sequence[str], folder: Path, port: int, answers: Callable[[], bool]) -> None:
        self.port = port
        self._command = list(command)
        self._output = folder / "output.txt"
        self._folder = folder
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self, timeout_s: float = 40.0) -> None:
        """Start and wait until it answers; RuntimeError with the end of its output when it does not."""
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=output, stderr=output)
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(
                    f"{self._command[0]} does not answer on port {self.port}: {self._output.read_text()[-2000:]}"
                )
            time.sleep(0.05)

    def stop(self, *, kill: bool = False) -> None:
        """Stop (kill: at once) and wait for the end. Idempotent."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextlib.contextmanager
def kafka_server(folder: Path, *, kafka_home: Path | None = None) -> Iterator[Server]:
    """One Kafka node (KRaft, 512 MB heap). `kafka_home`: an unpacked release, otherwise Maven brings the jars once."""
    java = _need("java", "openjdk-17-jre-headless")
    jars = kafka_home / "libs" if kafka_home is not None else _kafka_jars()
    port = free_port()
    settings = folder / "server.properties"
    settings.write_text(_KAFKA_CONFIG.format(port=port, controller=free_port(), data=folder / "data"))
    run = [java, "-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}/*"]
    storage = [
        *run,
        "kafka.tools.StorageTool",
        "format",
        "--ignore-formatted",
        "-t",
        _cluster_id(),
        "-c",
        str(settings),
    ]
    formatted = subprocess.run(storage, cwd=folder, capture_output=True, text=True, check=False)
    if formatted.returncode:
        raise RuntimeError(
            f"Kafka storage in {str(folder)!r} cannot be formatted: {formatted.stdout}{formatted.stderr}"
        )
    server = Server([*run, "kafka.Kafka", str(settings)], folder, port, lambda: _kafka_answers(port))
    server.start()
    try:
        yield server
    finally:
        server.stop(kill=True)


def _cluster_id() -> str:
    return uuid.uuid4().hex[:22]  # 22 characters of the base64 alphabet, as StorageTool wants


def _kafka_jars() -> Path:
    root = Path(__file__).resolve().parents[2]
    jars = root / ".kafka" / "libs"
    if not jars.is_dir():
        maven = _need("mvn", "maven")
        copying = root / ".kafka" / f"libs.{uuid.uuid4().hex}"
        command = [
            maven,
            "-q",
            "-f",
            str(root / "deploy/kafka/pom.xml"),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={copying}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Maven cannot bring Kafka's jars: {done.stdout[-2000:]}")
        with contextlib.suppress(OSError):  # another test run was first
            copying.rename(jars)
    return jars


def _kafka_answers(port: int) -> bool:
    if not _listens(port):
        return False
    try:
        admin = kafka.KafkaAdminClient(
            bootstrap_servers=f"127.0.0.1:{port}", bootstrap_timeout_ms=2000, request_timeout_ms=2000
        )
    except (kafka.errors.KafkaError, OSError):
        return False
    try:
        return bool(admin.describe_cluster()["brokers"])
    except (kafka.errors.KafkaError, OSError):
        return False
    finally:
        admin.close()


@contextlib.contextmanager
def redis_server(folder: Path, *, persistent: bool = False) -> Iterator[Server]:
    """One Redis; it forgets everything at a stop unless `persistent`."""
    port = free_port()
    command = [
        _need("redis-server", "redis-server"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
    ]
    command += ["--appendonly", "yes"] if persistent else []
    server = Server(command, folder, port, lambda: _redis_answers(port))
    server.start()
    try:
        yield server
    finally:
        server.stop(kill=True)


def _redis_answers(port: int) -> bool:
    client = redis.Redis(port=port, socket_timeout=1.0)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
