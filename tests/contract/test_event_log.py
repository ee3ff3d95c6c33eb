"""The contract of EventLog, on every implementation, and what each durable one owes when things break."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from recsys.clock import ManualClock, SystemClock
from recsys.config import Config, LogConfig
from recsys.errors import LogError, LogFull, LogTruncated, LogUnavailable, RecordTooLarge
from recsys.streams.base import EventLog
from recsys.streams.kafka import KafkaLog
from recsys.streams.memory_log import MemoryLog
from recsys.streams.open_log import open_log
from recsys.streams.positions import identities, keys_of, resume, split
from recsys.streams.ranges import read_range
from recsys.streams.sqlite_file import LogFile
from recsys.streams.sqlite_log import SqliteLog
from recsys.streams.watch import watching
from recsys.testing.servers import Server, free_port, kafka_server
from recsys.types import TOPICS, Batch, Record
from services.common.process import Stop
from services.common.rest import Rest

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()
KINDS = ["memory", "sqlite", pytest.param("kafka", marks=pytest.mark.system)]


class Place:
    """Opens the log of one test, several times if wanted (memory: always the same)."""

    def __init__(self, kind: str, folder: Path, server: Server | None) -> None:
        self.kind, self.folder, self.server = kind, folder, server
        self.prefix = f"t{next(_numbers)}-"
        self._opened: list[EventLog] = []
        self.clock = ManualClock(1000)

    def config(self) -> Config:
        if self.server is None:
            return Config(data_dir=self.folder)
        address = f"127.0.0.1:{self.server.port}"
        return Config(
            data_dir=self.folder,
            log=LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix=self.prefix, partitions=3),
        )

    def open(self, name: str = "one") -> EventLog:
        if self.kind == "memory":
            log: EventLog = self._opened[0] if self._opened else MemoryLog(self.clock)
        else:
            log = open_log(self.config(), self.clock, name)
        self._opened.append(log)
        return log

    def replace(self, topic: str) -> None:
        """Delete a topic, as an operator would, and let it be made anew."""
        if self.kind == "memory":
            self._opened.clear()
        elif self.server is None:
            for path in (self.folder / "log").glob(f"{topic}.db*"):
                path.unlink()
        else:
            admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{self.server.port}")
            (before,) = admin.describe_topics([self.prefix + topic])
            admin.delete_topics([self.prefix + topic])
            wait_until(lambda: admin.describe_topics([self.prefix + topic])[0]["topic_id"] != before["topic_id"])
            admin.close()

    def close(self) -> None:
        for log in self._opened:
            log.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(request.param, tmp_path, request.getfixturevalue("kafka") if request.param == "kafka" else None)
    yield place
    place.close()


def read_all(log: EventLog, topic: str, partition: int = 0, limit: int = 1000) -> list[Record]:
    found: list[Record] = []
    offset, end = log.begin(topic, partition), log.end(topic, partition)
    while offset < end:
        records = log.read(topic, partition, offset, limit)
        assert len(records) <= limit
        found += records
        offset = records.next
    return found


def wait_until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.01)


def messages(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [(f"k{i % 7}", b"value %d" % i) for i in range(start, start + count)]


def test_records_come_back_in_order_and_exactly_from_any_offset(place: Place) -> None:
    log = place.open()
    assert log.read("parameters", 0, log.begin("parameters", 0)) == []
    for start in range(0, 50, 10):
        log.append("parameters", messages(10, start))
    log.flush()
    records = read_all(log, "parameters", limit=7)
    assert [(r.key, r.value) for r in records] == messages(50)
    assert {(r.topic, r.partition) for r in records} == {("parameters", 0)}
    assert [r.offset for r in records] == sorted({r.offset for r in records})
    for at in (33, 0, 49, 12):
        assert log.read("parameters", 0, records[at].offset, 1) == [records[at]]
    assert log.read("parameters", 0, log.end("parameters", 0)) == []


def test_what_is_appended_while_a_reader_waits_at_the_end_arrives(place: Place) -> None:
    log = place.open()
    end = log.end("parameters", 0)
    assert log.read("parameters", 0, end) == []
    log.append("parameters", messages(1))
    log.flush()
    wait_until(lambda: len(log.read("parameters", 0, end)) == 1)


def test_who_watches_hears_of_an_append_before_or_while_it_waits(place: Place) -> None:
    log = place.open()
    watch = log.watch(["feedback", "impression"])
    log.append("feedback", messages(1))
    log.flush()

    def found(topic: str) -> int:
        return sum(len(read_all(log, topic, p)) for p in range(log.partitions(topic)))

    started = time.monotonic()
    while not found("feedback"):
        watch.wait(20.0)
    appending = threading.Timer(0.2, log.append, ("impression", messages(1)))
    appending.start()
    while not found("impression"):
        watch.wait(20.0)
    appending.join()
    assert time.monotonic() - started < 15.0, "it was told, and did not wait for its time to be over"


def test_one_key_stays_in_one_partition_and_impressions_are_placed_like_feedback(place: Place) -> None:
    log = place.open()
    assert log.partitions("impression") == log.partitions("feedback")
    for _ in range(3):
        log.append("feedback", messages(70))
        log.append("impression", messages(70))
    log.flush()
    homes: dict[str, dict[str, set[int]]] = {"feedback": {}, "impression": {}}
    for topic, partition in itertools.product(homes, range(log.partitions("feedback"))):
        for record in read_all(log, topic, partition):
            homes[topic].setdefault(record.key, set()).add(partition)
    assert len(homes["feedback"]) == 7
    assert all(len(found) == 1 for found in homes["feedback"].values())
    assert homes["feedback"] == homes["impression"]


def test_positions_outside_the_log_are_errors(place: Place) -> None:
    log = place.open()
    log.append("parameters", messages(3))
    log.flush()
    for wrong in (log.end("parameters", 0) + 1, log.end("parameters", 0) + 1000):
        with pytest.raises(LogTruncated, match="accept-gap"):
            log.read("parameters", 0, wrong)
    assert len(log.read("parameters", 0, log.begin("parameters", 0))) == 3


def test_a_log_has_an_identity_that_only_a_new_log_changes(place: Place) -> None:
    log = place.open()
    first = {topic: log.identity(topic, 0) for topic in ("item", "feedback")}
    assert all(first.values())
    log.append("feedback", messages(3))
    log.flush()
    other = place.open("two")
    assert {topic: other.identity(topic, 0) for topic in first} == first
    place.replace("feedback")
    again = place.open("three")
    assert again.identity("feedback", 0) != first["feedback"]
    assert again.identity("item", 0) == first["item"] or place.kind == "memory"


def test_a_position_in_another_log_is_a_gap_however_far_that_has_grown(place: Place) -> None:
    log = place.open()
    log.append("feedback", messages(5))
    log.flush()
    keys = keys_of(log, ["feedback"])
    saved, logs = {key: log.end("feedback", split(key)[1]) for key in keys}, identities(log, keys)
    assert resume(log, "test", ["feedback"], saved, logs, accept_gap=False) == (saved, [])
    assert resume(log, "test", ["feedback"], saved, {}, accept_gap=False) == (saved, []), "an old folder names no log"
    place.replace("feedback")
    again = place.open("two")
    again.append("feedback", messages(70))
    again.flush()
    with pytest.raises(LogTruncated, match=r"feedback/0 is another log .*recsys up --accept-gap"):
        resume(again, "test", ["feedback"], saved, logs, accept_gap=False)
    found = resume(again, "test", ["feedback"], saved, logs, accept_gap=True)
    assert found.positions == dict.fromkeys(keys, 0) and len(found.gaps) == len(keys)


def test_a_process_notices_a_log_made_anew_under_it(durable: Place) -> None:
    log = durable.open()
    log.append("feedback", messages(5))
    log.flush()
    assert log.read("feedback", 0, 0) or durable.kind == "kafka"
    durable.replace("feedback")

    def noticed() -> bool:
        try:
            log.read("feedback", 0, 0)
        except LogTruncated as error:
            return "made anew" in str(error)
        except LogUnavailable:
            pass
        return False

    wait_until(noticed)
    log.append("feedback", messages(1))  # what comes now is for the new log's readers
    log.flush()
    other = durable.open("two")
    wait_until(lambda: sum(len(read_all(other, "feedback", p)) for p in range(other.partitions("feedback"))) == 1)


def test_a_range_is_read_whole_although_reads_find_nothing(place: Place) -> None:
    log = place.open()
    log.append("parameters", messages(50))
    log.flush()
    stalling = Stalling(log)
    found = [r for batch in read_range(stalling, "parameters/0", 3, 45, limit=7) for r in batch]
    assert [r.offset for r in found] == list(range(3, 45))
    assert stalling.empty > 5
    with pytest.raises(LogUnavailable, match=r"parameters/0: nothing came from offset 50"):
        list(read_range(Stalling(log, end=60), "parameters/0", 0, 60, patience_s=0.05))
    with pytest.raises(LogTruncated, match="parameters/0 ends at 50, records up to 60"):
        list(read_range(log, "parameters/0", 0, 60, patience_s=5.0))


class Stalling:
    """A log whose every second read finds nothing, as when a broker is slow; it may promise more than it has."""

    def __init__(self, log: EventLog, end: int | None = None) -> None:
        self._log, self._end, self._turn, self.empty = log, end, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def end(self, topic: str, partition: int) -> int:
        return self._log.end(topic, partition) if self._end is None else self._end

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        self._turn += 1
        if self._turn % 2:
            self.empty += 1
            return Batch([], offset)
        return self._log.read(topic, partition, offset, limit)


def test_ends_asked_for_together_are_those_asked_for_one_by_one(place: Place) -> None:
    log = place.open()
    log.append("feedback", messages(7))
    log.append("impression", messages(2))
    log.flush()
    places = [(topic, n) for topic in ("feedback", "impression", "item") for n in range(log.partitions(topic))]
    assert log.ends(places) == [log.end(*each) for each in places]
    assert sum(log.ends(places)) >= 9 and log.ends([]) == []


def test_a_record_that_is_too_large_is_refused_whole(place: Place) -> None:
    log = place.open()
    with pytest.raises(RecordTooLarge, match="1048577 bytes, more than 1048576: split it"):
        log.append("parameters", [("k", b"x"), ("k", bytes(2**20 + 1))])
    assert log.end("parameters", 0) == 0


def test_concurrent_appends_keep_each_threads_order_and_lose_nothing(place: Place) -> None:
    log = place.open()

    def work(name: int) -> None:
        for i in range(0, 100, 5):
            log.append("parameters", [(f"t{name}", b"%d" % j) for j in range(i, i + 5)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.flush()
    records = read_all(log, "parameters")
    for name in range(4):
        assert [r.value for r in records if r.key == f"t{name}"] == [b"%d" % j for j in range(100)]


def test_large_and_odd_messages_pass_unchanged(place: Place) -> None:
    log = place.open()
    odd = [("", b""), ("ключ\x00\n", bytes(range(256))), ("big", os.urandom(2**20)), ("big", os.urandom(2**20))]
    log.append("parameters", odd)
    log.flush()
    assert [(r.key, r.value) for r in read_all(log, "parameters")] == odd


def test_log_time_never_goes_back(place: Place) -> None:
    log = place.open()
    for now in (5000, 9000, 2000, 9500):
        place.clock.set(now)
        log.append("feedback", [("k", b"x")])
    log.flush()
    times = [r.time_ms for p in range(log.partitions("feedback")) for r in read_all(log, "feedback", p)]
    assert len(times) == 4
    assert times == sorted(times)
    if place.kind != "kafka":
        assert times == [5000, 9000, 9000, 9500]


def test_commit_and_flush_accept_what_is_known(place: Place) -> None:
    log = place.open()
    log.append("feedback", messages(3))
    log.flush()
    log.commit("state", "feedback", 0, log.end("feedback", 0))
    log.close()
    log.close()


# What is told to another process.

CHILD = """
import os, sys, signal
from pathlib import Path
from recsys.clock import SystemClock
from recsys.config import parse
from recsys.streams.open_log import open_log
import orjson
log = open_log(parse(orjson.loads(sys.argv[1])), SystemClock(), "child")
for i in range(int(sys.argv[2])):
    log.append("feedback", [(f"k{i % 7}", b"%d" % i)])
    print(i, flush=True)
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
log.flush(); log.close()
"""


def run_child(place: Place, count: int, end: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, place.config().model_dump_json(), str(count), end]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=KINDS[1:])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(request.param, tmp_path, request.getfixturevalue("kafka") if request.param == "kafka" else None)
    yield place
    place.close()


def test_another_process_sees_the_records_and_kill_9_after_append_loses_nothing(durable: Place) -> None:
    log = durable.open()
    killed = run_child(durable, 150, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    accepted = {line.encode() for line in killed.stdout.split()}
    assert len(accepted) == 150
    if durable.kind == "kafka":
        durable.open("child").flush()  # the next process of this name sends what its spool kept
    found = [r for p in range(log.partitions("feedback")) for r in read_all(log, "feedback", p)]
    assert {r.value for r in found} == accepted
    for key in {r.key for r in found}:
        first_seen = list(dict.fromkeys(r.value for r in found if r.key == key))
        assert first_seen == sorted(first_seen, key=int)


def test_records_are_there_after_reopening(durable: Place) -> None:
    first = durable.open()
    first.append("parameters", messages(5))
    first.close()
    again = durable.open()
    again.append("parameters", messages(5, 5))
    again.flush()
    assert [(r.key, r.value) for r in read_all(again, "parameters")] == messages(10)


# SQLite alone.


def test_a_wait_ends_with_another_processes_append_to_that_topic_alone(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path, clock=SystemClock())
    of_feedback, of_items = log.watch(["feedback"]), log.watch(["item"])
    child = multiprocessing.get_context("fork").Process(target=_append_many, args=(tmp_path, "other"))
    child.start()
    started = time.monotonic()
    while log.end("feedback", 0) < 100:
        of_feedback.wait(60.0)
    assert time.monotonic() - started < 30.0
    child.join()
    waited = time.monotonic()
    of_items.wait(0.2)
    assert time.monotonic() - waited >= 0.15
    log.close()


UNTOLD = """
import os, signal, sys
from pathlib import Path
from recsys.clock import SystemClock
from recsys.streams import sqlite_file
from recsys.streams.sqlite_log import SqliteLog
log = SqliteLog(Path(sys.argv[1]), clock=SystemClock())
sqlite_file.touch = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
log.append("feedback", [("k", b"committed")])
"""


@pytest.mark.parametrize("without", ["the telling", "lock files", "inotify"])
def test_what_nobody_is_told_of_is_read_after_the_wait(tmp_path: Path, without: str) -> None:
    log = SqliteLog(tmp_path, clock=SystemClock())
    log.append("feedback", [("k", b"first")])
    rest = Rest(watching([tmp_path / "none"]) if without == "inotify" else log.watch(["feedback"]), Stop())
    if without == "lock files":
        for path in tmp_path.glob("*.lock"):
            path.unlink()
    rest(), rest()
    if without == "inotify":
        log.append("feedback", [("k", b"committed")])
    else:
        killed = subprocess.run([sys.executable, "-c", UNTOLD, str(tmp_path)], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
    started = time.monotonic()
    rest()
    assert time.monotonic() - started < 10.0
    assert [r.value for r in log.read("feedback", 0, 1)] == [b"committed"]
    log.close()


class Commits(SqliteLog):
    """Counts its commits."""

    number = 0

    def _append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> LogFile:
        self.number += 1
        return super()._append(topic, messages)


def test_what_comes_while_a_commit_is_under_way_is_one_commit_that_all_wait_for(tmp_path: Path) -> None:
    log = Commits(tmp_path, clock=SystemClock())
    log.append("impression", messages(1))
    with (tmp_path / "impression.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # another process's append is not done
        answers = [threading.Thread(target=log.append, args=("impression", messages(1, n))) for n in range(6)]
        for answer in answers:
            answer.start()
        while log._appends.num_waiting < 5:
            time.sleep(0.001)
        assert all(answer.is_alive() for answer in answers), "answered before it was logged"
    for answer in answers:
        answer.join()
    assert log.number == 3 and log.end("impression", 0) == 7
    log.close()


def test_a_loop_that_finds_nothing_does_not_ask_two_hundred_times_a_second(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path, clock=SystemClock())
    rest, started, turns = Rest(log.watch(["feedback", "impression"]), Stop()), time.monotonic(), 0
    while time.monotonic() - started < 1.0:
        rest()
        turns += 1
    assert turns <= 6
    for n in range(100):  # nor does one that is told of every single event: what comes meanwhile is taken together
        log.append("feedback", messages(1, n))
        if n == 0:
            started = time.monotonic()
        rest()
    assert time.monotonic() - started >= 0.45
    log.close()


def _append_many(folder: Path, name: str) -> None:
    log = SqliteLog(folder, clock=SystemClock())
    for i in range(50):
        log.append("feedback", [(name, b"%d" % i)] * 2)
    log.close()


def test_several_processes_write_one_sqlite_topic(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_append_many, args=(tmp_path, f"p{n}")) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    log = SqliteLog(tmp_path, clock=SystemClock())
    records = read_all(log, "feedback")
    assert [r.offset for r in records] == list(range(300))
    for n in range(3):
        assert [r.value for r in records if r.key == f"p{n}"] == [b"%d" % i for i in range(50) for _ in range(2)]
    log.close()


def _append_in_fork(log: SqliteLog) -> None:
    log.append("feedback", [("child", b"2")])
    log.close()


def test_a_forked_process_goes_on_with_an_open_sqlite_log(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path, clock=SystemClock())
    log.append("feedback", [("parent", b"1")])
    child = multiprocessing.get_context("fork").Process(target=_append_in_fork, args=(log,))
    child.start()
    child.join(20.0)
    assert child.exitcode == 0
    log.append("feedback", [("parent", b"3")])
    assert [r.value for r in log.read("feedback", 0, 0)] == [b"1", b"2", b"3"]
    log.close()


def test_what_the_reader_of_parameters_has_committed_is_dropped(durable: Place) -> None:
    log = durable.open()
    block = [("k", bytes(100_000))] * 50
    log.append("parameters", block)
    log.flush()
    log.commit("parameter", "parameters", 0, 40)
    log.append("parameters", block)  # embedded: retention is looked at when something is appended
    wait_until(lambda: log.begin("parameters", 0) == 40)
    log.flush()
    assert log.read("parameters", 0, 40)[0].offset == 40


def test_sqlite_drops_old_records_only_behind_every_committed_group(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path, clock=ManualClock(), retention_bytes=2**20)
    block = [("k", bytes(100_000))] * 50
    log.commit("fast", "impression", 0, 10_000)
    log.commit("slow", "impression", 0, 60)
    for _ in range(4):
        log.append("impression", block)
    wait_until(lambda: log.begin("impression", 0) == 60)
    with pytest.raises(LogTruncated, match=r"impression/0: offset 59 is outside 60\.\.200"):
        log.read("impression", 0, 59)
    assert [r.offset for r in log.read("impression", 0, 60, 2)] == [60, 61]
    log.commit("slow", "impression", 0, 10_000)
    log.append("impression", block)
    wait_until(lambda: log.begin("impression", 0) > 150)
    assert log.end("impression", 0) == 250
    log.close()


def test_sqlite_keeps_the_newest_record_of_every_item(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path, clock=ManualClock(), retention_bytes=2**20)
    for i in range(6):
        log.append("item", [(f"item{j}", b"%d" % i + bytes(100_000)) for j in range(25)])
    wait_until(lambda: len(read_all(log, "item")) < 100)
    newest = {r.key: r.value[:1] for r in read_all(log, "item")}
    assert newest == {f"item{j}": b"5" for j in range(25)}
    assert log.begin("item", 0) == 0
    log.close()


def filled(folder: Path, count: int = 300) -> str:
    """A closed log of records that tell their number; the identity of its topic."""
    log = SqliteLog(folder, clock=ManualClock(1000))
    for start in range(0, count, 10):
        log.append("feedback", [(f"k{n}", b"<%d>" % n + bytes(700)) for n in range(start, start + 10)])
    log.commit("trainer", "feedback", 0, 42)
    identity = log.identity("feedback", 0)
    log.close()
    return identity


def numbers(log: EventLog) -> list[int]:
    records = read_all(log, "feedback")
    assert all(record.value.startswith(b"<%d>" % record.offset) for record in records if record.key != "new")
    return [record.offset for record in records]


def test_a_flipped_bit_costs_its_record_and_no_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path)
    path = tmp_path / "feedback.db"
    data = bytearray(path.read_bytes())
    data[data.index(b"<123>") + 300] ^= 4
    path.write_bytes(data)
    for _ in range(2):
        log = SqliteLog(tmp_path, clock=ManualClock(1000))
        assert numbers(log) == [n for n in range(300) if n != 123]
        log.close()
    assert "1 damaged records" in caplog.text


def test_what_is_appended_while_it_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is asked for first; what came after it is read, too."""

    def opened(folder: Path) -> SqliteLog:
        return SqliteLog(folder, clock=ManualClock(1000))

    with contextlib.closing(opened(tmp_path)) as log, contextlib.closing(opened(tmp_path)) as other:
        log.append("feedback", [("u", b"1")])
        end = LogFile.end

        def late(file: LogFile) -> int:
            found = end(file)
            monkeypatch.undo()
            other.append("feedback", [("u", b"2")])
            return found

        monkeypatch.setattr(LogFile, "end", late)
        batch = log.read("feedback", 0, 0)
        assert [record.value for record in batch] == [b"1", b"2"] and batch.next == 2
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_damaged_page_is_repaired_and_the_log_stays_the_same(tmp_path: Path) -> None:
    identity = filled(tmp_path)
    path = tmp_path / "feedback.db"
    data = bytearray(path.read_bytes())
    at = data.index(b"<150>") // 8192 * 8192
    data[at : at + 8192] = os.urandom(8192)
    path.write_bytes(data)
    log, other = (SqliteLog(tmp_path, clock=ManualClock(1000)) for _ in range(2))
    found = numbers(log)
    assert len(found) > 280 and 150 not in found and found[-1] == 299
    other.append("feedback", [("new", b"after")])
    assert other.identity("feedback", 0) == log.identity("feedback", 0) == identity
    assert numbers(log) == numbers(other) == [*found, 300]
    assert (tmp_path / "feedback.db.damaged-1").exists(), "what was not read is kept"
    assert not (tmp_path / "feedback.db.damaged-2").exists(), "one process repaired it for both"
    log.close()
    other.close()


def test_wherever_a_byte_is_flipped_a_log_opens_reads_on_and_gives_no_number_twice(tmp_path: Path) -> None:
    identity = filled(tmp_path / "whole", 120)
    whole = (tmp_path / "whole" / "feedback.db").read_bytes()
    rng = random.Random(7)
    pages = [rng.randrange(0, 100)] + [page + rng.randrange(0, 24) for page in range(0, len(whole), 8192)]
    for place in pages + [rng.randrange(len(whole)) for _ in range(20)]:
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "feedback.db").write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        log = SqliteLog(folder, clock=ManualClock(1000))
        found = numbers(log)
        log.append("feedback", [("new", b"after")])
        assert log.identity("feedback", 0) != identity or numbers(log)[-1] >= 120
        assert numbers(log)[:-1] == found, f"byte {place}"
        log.close()


def test_a_file_that_is_no_log_is_set_aside_and_the_new_one_is_another_log(tmp_path: Path) -> None:
    identity = filled(tmp_path, 10)
    (tmp_path / "feedback.db").write_bytes(b"torn" * 5000)
    log = SqliteLog(tmp_path, clock=ManualClock(1000))
    assert log.identity("feedback", 0) != identity, "positions in it are a gap"
    assert (tmp_path / "feedback.db.damaged-1").read_bytes() == b"torn" * 5000
    log.close()


def test_a_log_of_an_earlier_release_is_read_and_gets_checksums(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "feedback.db")) as old, old:
        old.execute(
            "CREATE TABLE log (seq INTEGER PRIMARY KEY, time_ms INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL)"
        )
        old.execute("CREATE TABLE positions (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID")
        old.executemany("INSERT INTO log VALUES (?, 5, 'k', ?)", [(n, b"<%d>" % n) for n in range(7)])
    log = SqliteLog(tmp_path, clock=ManualClock(1000))
    log.append("feedback", [("new", b"after")])
    assert numbers(log) == list(range(8))
    log.close()


FULL = """
import resource, sys
from pathlib import Path
from recsys.clock import SystemClock
from recsys.errors import LogFull
from recsys.streams.positions import identities, keys_of, resume, split
from recsys.streams.ranges import read_range
from recsys.streams.sqlite_log import SqliteLog
log = SqliteLog(Path(sys.argv[1]), clock=SystemClock())
log.append("feedback", [("a", b"1")])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # as a full disk: writes beyond fail
try:
    log.append("feedback", [("b", bytes(1_000_000))])
except LogFull as error:
    print("full", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("feedback", [("c", b"3")])
print([record.key for record in log.read("feedback", 0, 0)])
"""


def test_full_disk_is_log_full_and_nothing_of_that_append_stays(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "full log file" in done.stdout, done.stderr
    assert "feedback.db" in done.stdout
    assert done.stdout.rstrip().endswith("['a', 'c']")


def test_append_after_close_is_an_error(durable: Place) -> None:
    log = durable.open()
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.append("feedback", messages(1))


# Kafka alone.


@pytest.mark.system
def test_topics_made_beforehand_get_the_settings_that_are_relied_on(tmp_path: Path, kafka: Server) -> None:
    address = f"127.0.0.1:{kafka.port}"
    admin = KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics({f"plain-{topic}": {"num_partitions": 1} for topic in TOPICS})
    admin.wait_for_topics([f"plain-{topic}" for topic in TOPICS])
    config = LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix="plain-")
    log = KafkaLog(config, tmp_path, clock=SystemClock())
    asked = [ConfigResource(ConfigResourceType.TOPIC, f"plain-{topic}") for topic in ("item", "feedback")]

    def settings() -> list[str]:
        found = admin.describe_configs(asked, config_filter="all")["topic"]
        return [str(found["plain-item"]["cleanup.policy"]["value"])] + [
            str(found[f"plain-{topic}"]["message.timestamp.type"]["value"]) for topic in ("item", "feedback")
        ]

    wait_until(lambda: settings() == ["compact", "LogAppendTime", "LogAppendTime"])
    log.append("feedback", [("k", bytes(2**20))])  # a broker's default takes 48 bytes less
    log.flush()
    admin.close()
    log.close()


@pytest.mark.system
def test_markers_and_records_taken_back_are_invisible(tmp_path: Path, kafka: Server) -> None:
    address = f"127.0.0.1:{kafka.port}"
    config = LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix="tx-")
    log = KafkaLog(config, tmp_path, clock=SystemClock())
    log.append("item", [("plain", b"1")])
    log.flush()
    producer = KafkaProducer(bootstrap_servers=address, transactional_id="tx", acks="all")
    producer.init_transactions()
    for name in ("kept", "taken back"):
        producer.begin_transaction()
        producer.send("tx-item", key=name.encode(), value=b"2")
        producer.flush()
        assert log.end("item", 0) == (1 if name == "kept" else 3), "what is not committed is not there yet"
        producer.commit_transaction() if name == "kept" else producer.abort_transaction()
        wait_until(lambda end=3 if name == "kept" else 5: log.end("item", 0) == end)
    producer.close()
    assert [r.key for r in read_all(log, "item")] == ["plain", "kept"]
    assert [r.key for batch in read_range(log, "item/0", 2, 5) for r in batch] == []
    assert log.read("item", 0, 4).next == 5
    log.close()


@pytest.mark.system
def test_after_a_crash_of_the_broker_all_that_was_accepted_arrives_and_nothing_is_left_open(tmp_path: Path) -> None:
    home = os.environ.get("KAFKA_HOME")
    with kafka_server(tmp_path, kafka_home=Path(home) if home else None) as server:
        config = LogConfig(kind="kafka", bootstrap_servers=f"127.0.0.1:{server.port}", spool_bytes=2**16)
        log = KafkaLog(config, tmp_path / "spool", clock=SystemClock())
        log.append("parameters", messages(10))
        log.flush()
        assert len(read_all(log, "parameters")) == 10 and log.trouble() == ""
        own = psutil.Process()
        threads, descriptors = own.num_threads(), own.num_fds()
        server.stop(kill=True)
        away_until_s = time.monotonic() + 12.0  # long enough for a producer to give up what it sent
        accepted = 10
        with pytest.raises(LogFull, match="spool_bytes"):
            while True:
                log.append("parameters", messages(10, accepted))
                accepted += 10
        assert accepted > 1000
        with pytest.raises(LogUnavailable):
            log.flush(0.2)

        def away() -> bool:
            try:
                log.read("parameters", 0, 10)
            except LogUnavailable:
                return True
            return False

        wait_until(away)
        wait_until(lambda: time.monotonic() > away_until_s)
        assert "accepted reach nobody" in log.trouble()
        # What tries again just now may have a thread and its sockets.
        wait_until(lambda: own.num_threads() <= threads + 1 and own.num_fds() <= descriptors + 4)
        server.start()
        log.flush(30.0)
        found: list[Record] = []

        def all_read() -> bool:
            with contextlib.suppress(LogUnavailable):  # reader and admin connections come back one after the other
                found[:] = read_all(log, "parameters")
            return bool(found)

        wait_until(all_read)
        wait_until(lambda: log.trouble() == "")
        assert list(dict.fromkeys((r.key, r.value) for r in found)) == messages(accepted)
        log.append("parameters", messages(1))
        log.close()


@pytest.mark.system
def test_kafka_log_starts_without_the_broker_and_names_it(tmp_path: Path) -> None:
    log = KafkaLog(LogConfig(kind="kafka", bootstrap_servers=f"127.0.0.1:{free_port()}"), tmp_path, clock=SystemClock())
    log.append("feedback", messages(1))
    for call in (
        lambda: log.read("feedback", 0, 0),
        lambda: log.end("feedback", 0),
        lambda: log.partitions("feedback"),
    ):
        with pytest.raises(LogUnavailable, match="bootstrap_servers"):
            call()
    log.close()


@pytest.mark.system
def test_different_partition_counts_are_refused_and_deleted_records_are_a_gap(tmp_path: Path, kafka: Server) -> None:
    address = f"127.0.0.1:{kafka.port}"
    admin = KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics({"bad-impression": {"num_partitions": 2}, "bad-feedback": {"num_partitions": 3}})
    with pytest.raises(LogError, match=r"bad-impression \(2 partitions\) and bad-feedback \(3\)"):
        KafkaLog(
            LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix="bad-"), tmp_path / "a", clock=SystemClock()
        )
    log = KafkaLog(
        LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix="gap-"), tmp_path / "b", clock=SystemClock()
    )
    log.append("feedback", messages(10))
    log.flush()
    admin.delete_records({TopicPartition("gap-feedback", 0): 4})
    wait_until(lambda: log.begin("feedback", 0) == 4)
    with pytest.raises(LogTruncated, match=r"offset 3 is outside 4\.\.10"):
        log.read("feedback", 0, 3)
    assert len(log.read("feedback", 0, 4)) == 6
    admin.close()
    log.close()


@pytest.mark.system
def test_committed_positions_show_at_the_broker(tmp_path: Path, kafka: Server) -> None:
    address = f"127.0.0.1:{kafka.port}"
    log = KafkaLog(
        LogConfig(kind="kafka", bootstrap_servers=address, topic_prefix="lag-"), tmp_path, clock=SystemClock()
    )
    log.commit("trainer", "feedback", 0, 42)
    admin = KafkaAdminClient(bootstrap_servers=address)
    partition = TopicPartition("lag-feedback", 0)

    def committed() -> int:
        try:
            found = admin.list_group_offsets({"trainer": [partition]})["trainer"]
        except KafkaError:  # the broker is still making the topic of positions
            return -1
        return found[partition].offset if partition in found else -1

    log.flush()
    wait_until(lambda: committed() == 42)
    admin.close()
    log.close()
