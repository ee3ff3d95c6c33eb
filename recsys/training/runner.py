"""The trainer over time: restart, poll, journal, step, publish, checkpoint."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable

import orjson

from recsys import metrics
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import Fenced, LogTruncated
from recsys.streams.base import EventLog
from recsys.training.checkpoint import Checkpoints
from recsys.training.journal import Entry, Journal
from recsys.training.old_towers import first_upserts
from recsys.training.publish import Publisher
from recsys.training.trainer import StepReport, Trainer
from recsys.types import Record

CONSUMER = "trainer"
TOPICS = ("item", "impression", "feedback")
READ_LIMIT = 1000
"""Records of one partition taken in one step: half makes a backlog slower, double holds a step (and freshness) longer."""

MARK_MS = 100
"""The log's ends are asked for this often, to know what time everything was read up to: half asks twice as much, double holds
labels back for longer."""

OnStep = Callable[[StepReport, float], None]


class Runner:
    """One trainer process's loop. `crash` is called at each named gap, for crash tests."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        clock: Clock,
        on_step: OnStep = lambda *_: None,
        crash: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self._log, self._clock = config, log, clock
        self._on_step, self._crash = on_step, crash
        self.folder = config.data_dir / "trainer"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(config, self.folder)
        self.journal = Journal(self.folder)
        self.checkpoints = Checkpoints(self.folder, self.trainer, self.journal, crash)
        self._letters: list[tuple[str, bytes]] = []
        self.epoch = 0
        self.positions: dict[str, int] = {}
        self._now_ms = 0
        self._marked_ms, self._marks = 0, dict[str, int]()
        """The partitions' ends at one log time; once they are read, nothing before it is still unread."""
        self._read_ms: dict[str, int] = {}
        self._last = {"rows": 0.0, "dense": 0.0, "checkpoint": clock.monotonic_s()}

    def start(self, *, accept_gap: bool = False, publish: bool = True) -> None:
        """Take the next epoch, load, run the journal's steps again without publishing, then publish what they changed.

        Raises LogTruncated when the log no longer has what the checkpoint needs, unless `accept_gap`.
        """
        self.epoch = self._take_epoch()
        self.positions = {f"{t}/{p}": 0 for t in TOPICS for p in range(self._log.partitions(t))}
        loaded = self.checkpoints.load()
        self._check_positions(loaded, accept_gap)
        self._read_catalogue(loaded)
        self.positions |= loaded
        self.journal.trim_torn_tail()
        for entry in self.journal.entries(self.trainer.steps + 1):
            self._run(entry)
        self.publisher = Publisher(self._log, self.trainer, self.epoch)
        self._crash("replayed")
        if publish:
            self.publisher.publish_dense()
            self.publisher.publish_rows()

    def _take_epoch(self) -> int:
        epoch = self._newest_epoch() + 1
        while True:
            try:
                (self.folder / f"epoch-{epoch:08d}").open("x").close()
            except FileExistsError:
                epoch += 1
            else:
                break
        for path in self.folder.glob("epoch-*"):
            if int(path.name.removeprefix("epoch-")) < epoch:
                path.unlink(missing_ok=True)
        return epoch

    def _newest_epoch(self) -> int:
        return max(
            (
                int(p.name.removeprefix("epoch-"))
                for p in self.folder.glob("epoch-*")
                if re.fullmatch(r"epoch-\d+", p.name)
            ),
            default=0,
        )

    def _check_positions(self, loaded: dict[str, int], accept_gap: bool) -> None:
        for name, partition in (self._split(p) for p in self.positions):
            key = f"{name}/{partition}"
            offset, begin, end = loaded.get(key, 0), self._log.begin(name, partition), self._log.end(name, partition)
            if loaded and name != "item" and not begin <= offset <= end:
                if not accept_gap:
                    raise LogTruncated(
                        f"topic {name} partition {partition} holds offsets {begin} to {end}, the checkpoint stands at {offset}: restore the "
                        "log, or restart with --accept-gap to go on from what is left"
                    )
                loaded[key] = min(max(offset, begin), end)
            elif loaded:
                loaded[key] = max(offset, begin)
            else:
                self.positions[key] = begin

    def _read_catalogue(self, loaded: dict[str, int]) -> None:
        """The catalogue is not checkpointed: the `item` topic is compacted, and read again up to the saved position."""
        for key, end in loaded.items():
            topic, partition = self._split(key)
            if topic != "item":
                continue
            records = self._read_range(topic, partition, self._log.begin(topic, partition), end)
            for record in records:
                self.trainer.take(record, StepReport())
            towers = self.trainer.towers
            if towers is not None and towers.numbered is not None:
                towers.number(first_upserts(records) if self._log.partitions(topic) == 1 else None)

    @staticmethod
    def _split(key: str) -> tuple[str, int]:
        topic, partition = key.rsplit("/", 1)
        return topic, int(partition)

    def _read_range(self, topic: str, partition: int, start: int, end: int) -> list[Record]:
        records: list[Record] = []
        while start < end:
            batch = self._log.read(topic, partition, start, READ_LIMIT)
            records += [r for r in batch if r.offset < end]
            if not batch:
                break
            start = batch[-1].offset + 1
        return records

    def _run(self, entry: Entry) -> StepReport:
        """Run a journaled step again: the same records, the same time."""
        records = [
            r
            for key in self._order(entry.ends)
            for r in self._read_range(*self._split(key), self.positions[key], entry.ends[key])
        ]
        report = self.trainer.step(records, entry.now_ms, entry.learn)
        self.positions |= entry.ends
        self._now_ms = entry.now_ms
        return report

    @staticmethod
    def _order(ends: dict[str, int]) -> list[str]:
        """Items before impressions before feedback, then by partition."""
        return sorted(ends, key=lambda key: (TOPICS.index(key.rsplit("/", 1)[0]), int(key.rsplit("/", 1)[1])))

    def turn(self) -> bool:
        """One turn of the loop; False when there was nothing to do (then wait a little)."""
        worked = False
        if not self.trainer.breaker_open or self._resumed():
            worked = self._step(learn=True)
        self._publish()
        self._checkpoint()
        return worked

    def _resumed(self) -> bool:
        """Breaker: wait for `recsys trainer resume --learn | --skip`, which leaves a file here."""
        path = self.folder / "resume"
        if not path.exists():
            return False
        skip = path.read_text().strip() == "skip"
        path.unlink()
        while skip and self._step(learn=False):
            pass
        self.trainer.close_breaker()
        return True

    def _step(self, *, learn: bool) -> bool:
        records, ends, watermark = self._poll()
        now_ms = max(self._now_ms, watermark)
        if not records and not self.trainer.joiner.due(now_ms):
            return False
        # 1. Write down what this step will be; 2. run it; 3. report; dead letters may repeat after a crash, under the same key.
        self.journal.append(Entry(step=self.trainer.steps + 1, now_ms=now_ms, ends=ends, learn=learn))
        self._crash("journaled")
        started = time.perf_counter()
        report = self.trainer.step(records, now_ms, learn)
        self.positions |= ends
        self._now_ms = now_ms
        self._crash("stepped")
        self._bury(report)
        self._on_step(report, time.perf_counter() - started)
        return True

    def _poll(self) -> tuple[list[Record], dict[str, int], int]:
        """New records, the partitions' new ends, and log time: no impression or feedback before it is still unread.

        A read that found nothing does not say so: Kafka's client answers before the broker did. Items go first: as long as there may be
        more of them nothing else is read, which would be learned without knowing what it names.
        """
        records: list[Record] = []
        ends: dict[str, int] = {}
        self._mark()
        for key in self._order(self.positions):
            batch = self._log.read(*self._split(key), self.positions[key], READ_LIMIT)
            if batch:
                records += batch
                ends[key] = batch[-1].offset + 1
                self._read_ms[key] = max(self._read_ms.get(key, 0), batch[-1].time_ms)
            if len(batch) >= READ_LIMIT and key.startswith("item/"):
                break
        for key, end in self._marks.items():
            if ends.get(key, self.positions[key]) >= end:
                self._read_ms[key] = max(self._read_ms.get(key, 0), self._marked_ms)
        return records, ends, self._all_read_ms()

    def _all_read_ms(self) -> int:
        return min((self._read_ms.get(key, 0) for key in self._marks), default=0)

    def _mark(self) -> None:
        """Ask for the ends again, once those of the last time were read."""
        now_ms = self._clock.now_ms()
        if self._all_read_ms() >= self._marked_ms and (not self._marks or now_ms - self._marked_ms >= MARK_MS):
            timed = [key for key in self.positions if not key.startswith("item/")]
            self._marked_ms, self._marks = now_ms, {key: self._log.end(*self._split(key)) for key in timed}

    def _bury(self, report: StepReport) -> None:
        for letter in report.dead_letters:
            record = letter.record
            body = {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "time_ms": record.time_ms,
                "reason": letter.reason,
                "key": record.key,
                "value": base64.b64encode(record.value).decode(),
            }
            self._letters.append((f"{record.topic}/{record.partition}/{record.offset}", orjson.dumps(body)))
        if self._letters:
            self._log.append("dead_letter", self._letters)  # when the log is full they wait here
            self._letters = []

    def _publish(self, *, force: bool = False) -> None:
        training, now, bandit = self.config.training, self._clock.monotonic_s(), self.trainer.bandit
        force = force or (bandit is not None and bandit.moved)
        if force or now - self._last["rows"] >= training.publish_ms / 1000:
            if self._newest_epoch() > self.epoch:
                raise Fenced(
                    f"epoch {self._newest_epoch()} took over from epoch {self.epoch}: this trainer stops; run one trainer a folder"
                )
            with metrics.PUBLISH_SECONDS.time():
                self.publisher.publish_rows()
            self._last["rows"] = now
        if force or now - self._last["dense"] >= training.dense_publish_s:
            self.publisher.publish_dense()
            self._last["dense"] = now
            if bandit is not None:
                bandit.moved = False

    def _checkpoint(self) -> None:
        if (positions := self.checkpoints.poll()) is not None:
            self._commit(positions)
        if self._clock.monotonic_s() - self._last["checkpoint"] >= self.config.training.checkpoint_s:
            self.checkpoint(wait=False)

    def checkpoint(self, *, wait: bool) -> None:
        """Publish, then take a checkpoint: what it holds is always published before."""
        self._publish(force=True)
        self._log.flush()
        with metrics.CHECKPOINT_SECONDS.time():
            taken = self.checkpoints.save(self.positions, wait=wait)
        if taken:
            self._last["checkpoint"] = self._clock.monotonic_s()
            if wait:
                self._commit(self.checkpoints.kept_positions)

    @property
    def checkpoint_age_s(self) -> float:
        """Seconds since the last checkpoint began."""
        return self._clock.monotonic_s() - self._last["checkpoint"]

    def lag(self) -> dict[tuple[str, int], int]:
        """Records not yet read, by (topic, partition)."""
        split = {self._split(key): offset for key, offset in self.positions.items()}
        return {place: max(0, self._log.end(*place) - offset) for place, offset in split.items()}

    def _commit(self, positions: dict[str, int]) -> None:
        for key, offset in positions.items():
            self._log.commit(CONSUMER, *self._split(key), offset)

    def close(self) -> None:
        """Stop cleanly: a last publish and checkpoint."""
        self.checkpoint(wait=True)
        self.checkpoints.close()
        self.journal.close()
