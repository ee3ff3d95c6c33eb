"""The trainer: a restart at any gap gives what running straight through gives, bit for bit."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from recsys.bandit.served import Served
from recsys.candidates.sources import Sources
from recsys.clock import ManualClock
from recsys.config import Config, parse
from recsys.errors import Fenced, LogTruncated, SchemaMismatch
from recsys.events import messages
from recsys.events.recent import HORIZON_MS
from recsys.events.seen_ids import Kind
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.files import seal, unseal
from recsys.model.layouts import layouts
from recsys.parameters.deltas import Delta, DeltaReader, Version, encode_delta
from recsys.parameters.store import ParameterStore
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.state.memory_state import MemoryState
from recsys.streams.memory_log import MemoryLog
from recsys.testing.crash import Abort, AbortAt
from recsys.testing.world import World
from recsys.training.epochs import newest_published, take_epoch
from recsys.training.journal import Entry
from recsys.training.runner import Runner
from recsys.training.spill import Place
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from recsys.types import Batch, Feedback, Impression, ShownItem

GAPS = (
    "journaled",
    "stepped",
    "captured",
    "journal begun",
    "segment written",
    "small written",
    "manifest renamed",
    "acknowledged",
    "replayed",
)


PLAIN: Mapping[str, Any] = {}


def configuration(folder: Path, options: Mapping[str, Any] = PLAIN) -> Config:
    return parse(
        {
            "data_dir": str(folder),
            "tasks": [
                {"name": "click", "types": ["click"], "window_s": 2},
                {"name": "like", "types": ["like"], "window_s": 5, "prior": 0.02},
            ],
            "model": {"dim": 4, "expert_hidden": [8, 4], "attention": [8], "tower_dim": 4},
            "training": {"batch_size": 64, "expire_every_steps": 7},
            "table": {"capacity": 20_000, "expiry_s": 30},
        }
        | options
    )


EVERYTHING: Mapping[str, Any] = {
    "tasks": [
        {"name": "click", "types": ["click"], "window_s": 2, "labels": "early_positive"},
        {"name": "like", "types": ["like"], "window_s": 5, "prior": 0.02, "labels": "fnw", "after": "click"},
        {"name": "both", "types": ["click", "like"], "window_s": 6, "labels": "es_dfm", "wait_s": 1, "group": "watch"},
    ],
    "features": {"sequences": {"clicks": ["click"], "likes": ["like"]}, "time_gaps": True},
    "retrieval": {"sources": {"covisited": 20, "trending": 20, "bandit": 20}},
    "bandit": {"clusters": 4, "half_life_s": 0.5, "reward_window_s": 5, "expiry_s": 20},
    "model": {
        "dim": 4,
        "expert_hidden": [8, 4],
        "attention": [8],
        "tower_dim": 4,
        "input_width": 16,
        "row_l2": 0.1,
        "row_optimizer": "adam",
        "wide_optimizer": "ftrl",
        "dense_optimizer": "adagrad",
        "calibrate": True,
        "error_memory": 0.3,
        "hard_negatives": 2,
    },
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> MemoryLog:
    """A log of requests answered by the untrained pipeline, and what users did; one second each."""
    return answered(configuration(tmp_path_factory.mktemp("world")))


def answered(config: Config) -> MemoryLog:
    """Such a log, of any configuration."""
    clock, world, schema = ManualClock(1_000_000), World(seed=1, num_users=12, num_items=60), Schema.of(config)
    log, sources = MemoryLog(clock), Sources(config, schema, Catalogue(schema))
    for item in world.items():
        sources.item(item)
        log.append("item", [(item.item_id, messages.dump_item(item))])
    log.append("item", [("bad", b"not json")])
    store = ParameterStore(layouts(config, schema), schema.hash)
    pipeline = Pipeline(config, schema, MemoryState(50, 1000), sources, Scorer(config, schema, store), None)
    for number in range(60):
        clock.advance(1000)
        user = world.any_user()
        request = Request(
            request_id=f"r{number}",
            user_id=world.users[user],
            n=8,
            candidates=tuple(i.item_id for i in world.items()[number % 40 : number % 40 + 15]),
        )
        answer = pipeline.recommend(request, clock.now_ms())
        impressions = explored(answer.impression, number) if config.explores else [answer.impression]
        log.append("impression", [(request.user_id, messages.dump_impression(one)) for one in impressions])
        shown = [item.item_id for item in answer.items]
        for item_id, clicked in zip(shown, world.clicks(user, shown), strict=True):
            if clicked:
                event = Feedback(
                    event_id=f"{number}-{item_id}",
                    user_id=request.user_id,
                    item_id=item_id,
                    type="click",
                    time_ms=0,
                    request_id=f"r{number}",
                )
                log.append("feedback", [(request.user_id, messages.dump_feedback(event))])
    return log


def explored(impression: Impression, number: int) -> list[Impression]:
    """The impression as a bandit would have served it, among three that only a bandit can learn from."""
    rng, size = np.random.default_rng(number), min(4, 1 + number // 10)
    found = []
    for extra in range(4):
        served = Served(
            generation=f"g{number // 40}",
            clusters=np.arange(size),
            weights=np.sort(rng.dirichlet(np.ones(size)).astype(np.float32))[::-1],
            vector=rng.normal(size=4).astype(np.float32),
            edges=rng.integers(0, 2**size, len(impression.items)).astype(np.uint64),
        )
        found.append(replace(impression, bandit=served.encode()))
        if extra:
            other = f"{impression.request_id}-{extra}"
            found[-1] = replace(found[-1], request_id=other, features=b"", schema="")
    return found


def turns(runner: Runner, clock: ManualClock, until: int) -> Iterator[int]:
    """Run the log's minute in steps of 700 ms; a checkpoint every 20 turns."""
    turn = runner.trainer.steps
    while clock.now_ms() < until:
        clock.advance(700)
        runner.turn()
        turn += 1
        if turn % 20 == 0:
            runner.checkpoint(wait=True)
        yield turn


class Slowly:
    """The log as it looks at the clock's time: records stamped later are not there yet."""

    def __init__(self, log: MemoryLog, clock: ManualClock) -> None:
        self._log, self._clock, self.published = log, clock, MemoryLog(clock)

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)

    def append(self, topic: str, messages: list[tuple[str, bytes]]) -> None:
        self.published.append(topic, messages)

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        found = [r for r in self._log.read(topic, partition, offset, limit) if r.time_ms <= self._clock.now_ms()]
        return Batch(found, found[-1].offset + 1 if found else offset)


END = 1_000_000 + 75_000


def run(
    log: MemoryLog, folder: Path, gap: str = "", count: int = 1, options: Mapping[str, Any] = PLAIN
) -> tuple[Runner, Slowly, int]:
    """Run to the end, restarting after each crash; returns the last runner, its log, and how often it crashed."""
    clock, crashes = ManualClock(1_000_000), 0
    view = Slowly(log, clock)
    crash = AbortAt(gap, count)
    while True:
        runner = Runner(configuration(folder, options), view, clock, crash=crash)  # type: ignore[arg-type]
        try:
            runner.start()
            for _ in turns(runner, clock, END):
                pass
        except Abort:
            crashes += 1
            continue
        return runner, view, crashes


def parameters(runner: Runner) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Every row and weight, in a canonical order."""
    found: dict[str, np.ndarray] = {}  # type: ignore[type-arg]
    for layout, table in runner.trainer.tables.items():
        touched = table.touched("comparison")
        order = np.lexsort((touched.keys, touched.slots))
        rows = table.export(touched.slots[order], touched.keys[order])
        found |= {
            f"{layout}.{name}": getattr(rows, name)
            for name in ("slots", "keys", "values", "state", "last_seen_ms", "uses")
        }
    for name, value in runner.trainer.learner.model.state_dict().items():
        found[f"dense.{name}"] = value.numpy()
    if runner.trainer.bandit:
        found |= {f"bandit.{name}": array for name, array in runner.trainer.bandit.state().items()}
    return found


@pytest.fixture(scope="module")
def straight(log: MemoryLog, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    runner, view, crashes = run(log, tmp_path_factory.mktemp("straight"))
    assert crashes == 0
    assert runner.trainer.steps > 40
    assert len(runner.trainer.tables["deep"]) > 20
    letters = view.published.read("dead_letter", 0, 0)
    assert [r.key for r in letters] == ["item/0/60"]
    return parameters(runner)


@pytest.mark.parametrize("gap", GAPS)
def test_a_crash_at_any_gap_changes_nothing(gap: str, log: MemoryLog, straight, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    count = {"journaled": 33, "stepped": 47, "replayed": 1}.get(gap, 2)
    runner, _, crashes = run(log, tmp_path, gap, count)
    assert crashes == 1
    crashed = parameters(runner)
    assert crashed.keys() == straight.keys()
    for name, expected in straight.items():
        np.testing.assert_array_equal(crashed[name], expected, err_msg=name)


@pytest.mark.parametrize("gap", ["stepped", "manifest renamed"])
def test_a_crash_changes_nothing_with_every_option_on(gap: str, tmp_path: Path) -> None:
    log = answered(configuration(tmp_path / "world", EVERYTHING))
    straight, _, _ = run(log, tmp_path / "straight", options=EVERYTHING)
    runner, _, crashes = run(log, tmp_path / "crashed", gap, 47 if gap == "stepped" else 2, EVERYTHING)
    assert crashes == 1 and straight.trainer.towers is not None
    assert straight.trainer.steps > 40 and straight.trainer.learner.model.calibrator is not None
    assert straight.trainer.bandit is not None and len(straight.trainer.bandit.clusters) > 1
    assert len(straight.trainer.tables["edge"]) > 20
    crashed = parameters(runner)
    for name, expected in parameters(straight).items():
        np.testing.assert_array_equal(crashed[name], expected, err_msg=name)


@pytest.mark.parametrize("gap", ["stepped", "manifest renamed"])
def test_a_crash_changes_nothing_where_rows_make_room(gap: str, tmp_path: Path) -> None:
    full = {**EVERYTHING, "table": {"capacity": 60, "expiry_s": 30}}
    log = answered(configuration(tmp_path / "world", full))
    straight, _, _ = run(log, tmp_path / "straight", options=full)
    runner, view, crashes = run(log, tmp_path / "crashed", gap, 47 if gap == "stepped" else 2, full)
    assert crashes == 1
    for layout in ("deep", "wide", "edge"):
        table = straight.trainer.tables[layout]
        assert table.evicted > 60 and len(table) <= 60, layout
    crashed = parameters(runner)
    for name, expected in parameters(straight).items():
        np.testing.assert_array_equal(crashed[name], expected, err_msg=name)
    runner.close()
    compare_with_serving(runner, view)


def test_serving_equals_the_trainer_after_a_restart(log: MemoryLog, tmp_path: Path) -> None:
    runner, view, _ = run(log, tmp_path, "stepped", 55)
    runner.close()
    assert compare_with_serving(runner, view).state.version.epoch == runner.epoch == 2


def compare_with_serving(runner: Runner, view: Slowly) -> ParameterStore:
    """What was published, applied: the trainer's rows, bit for bit, and no others."""
    store = ParameterStore(layouts(runner.config, runner.trainer.schema), runner.trainer.schema.hash)
    reader = DeltaReader()
    for record in view.published.read("parameters", 0, 0, 100_000):
        if (delta := reader.feed(record.value)) is not None:
            store.apply(delta)
    for layout, table in runner.trainer.tables.items():
        touched = table.touched("comparison")
        served, found = store.tables[layout].lookup(touched.slots, touched.keys)
        assert found.all()
        rows = table.export(touched.slots, touched.keys)
        np.testing.assert_array_equal(served, rows.values)
        seen = store.tables[layout].export(touched.slots, touched.keys).last_seen_ms
        np.testing.assert_array_equal(seen, rows.last_seen_ms)
        assert len(store.tables[layout]) == len(table), "rows that expired must have left serving, too"
    return store


def test_a_newer_trainer_fences_the_older_one(log: MemoryLog, tmp_path: Path) -> None:
    clock = ManualClock(1_000_000)
    first, second = (Runner(configuration(tmp_path), Slowly(log, clock), clock) for _ in range(2))  # type: ignore[arg-type]
    first.start()
    second.start()
    assert second.epoch == first.epoch + 1
    first._last["rows"] = 0.0
    with pytest.raises(Fenced, match="took over"):
        first.turn()


def test_a_checkpoint_of_another_version_is_refused_with_the_way_out(log: MemoryLog, tmp_path: Path) -> None:
    runner, _, _ = run(log, tmp_path)
    runner.close()
    (manifest,) = tmp_path.rglob("manifest.json")
    manifest.write_bytes(seal(unseal(manifest.read_bytes()) | {"version": 1}))
    with pytest.raises(SchemaMismatch, match="of version 1, this release reads 2: start on an empty data_dir"):
        Runner(configuration(tmp_path), log, ManualClock(END)).start()


def test_a_log_cut_under_the_checkpoint_is_refused_unless_accepted(log: MemoryLog, tmp_path: Path) -> None:
    runner, _, _ = run(log, tmp_path)
    runner.close()
    clock = ManualClock(END)
    empty = MemoryLog(clock)
    with pytest.raises(LogTruncated, match="--accept-gap"):
        Runner(configuration(tmp_path), empty, clock).start()
    again = Runner(configuration(tmp_path), empty, clock)
    again.start(accept_gap=True)
    assert again.trainer.steps == runner.trainer.steps


def test_feedback_that_came_too_late_is_learned_by_nobody(tmp_path: Path) -> None:
    trainer = Trainer(configuration(tmp_path), tmp_path)
    report = StepReport()
    for late_ms in (0, HORIZON_MS, HORIZON_MS + 1):
        event = Feedback(event_id=str(late_ms), user_id="u", item_id="i", type="click", time_ms=5)
        trainer.traffic.feedback(event, 5 + late_ms, report)
        items = (ShownItem(item_id="i", position=1),)
        trainer.traffic.impression(
            Impression(request_id=str(late_ms), user_id="u", time_ms=5, items=items), 5 + late_ms, report
        )
    learned = {"no_request": 2, "impression_no_features": 2}
    assert report.outcomes == {**learned, "too_late": 1, "impression_too_late": 1}


def test_ids_of_a_clock_that_was_ahead_make_nothing_too_late_once_time_is_set_back(tmp_path: Path) -> None:
    trainer = Trainer(configuration(tmp_path, {"capacity": {"memory_bytes": 2**28}}), tmp_path)
    number, now_ms, ahead_ms = 0, 100 * HORIZON_MS, 200 * HORIZON_MS
    while not trainer.seen.too_late(Kind.REQUEST, now_ms, now_ms):
        trainer.seen.first(Kind.REQUEST, number, ahead_ms)
        number += 1
    trainer.step([], Entry(step=1, now_ms=ahead_ms, ends={}))
    trainer.step([], Entry(step=2, now_ms=now_ms, ends={}))
    assert not trainer.seen.too_late(Kind.REQUEST, now_ms, now_ms)


def test_an_open_impression_that_cannot_be_learned_is_buried_and_the_rest_is_learned(
    log: MemoryLog, tmp_path: Path
) -> None:
    clock = ManualClock(1_000_000)
    view = Slowly(log, clock)
    runner = Runner(configuration(tmp_path), view, clock)  # type: ignore[arg-type]
    runner.start()
    for _ in turns(runner, clock, 1_000_000 + 30_000):
        pass
    runner.close()
    opened = runner.trainer.joiner.state()["open"]
    assert len(opened) > 3
    place = Place(*opened[2][5])
    with (tmp_path / "trainer" / "open" / f"{place.minute}.features").open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff" * place.length)
    reports: list[StepReport] = []
    again = Runner(configuration(tmp_path), view, clock, lambda report, _: reports.append(report))  # type: ignore[arg-type]
    again.start()
    for _ in turns(again, clock, END):
        pass
    learned = {emission.request_id for report in reports for emission in report.emissions}
    left = {entry[0] for entry in opened} | {f"r{n}" for n in range(35, 60)}
    assert opened[2][0] not in learned and left - {opened[2][0]} <= learned
    (letter,) = [json.loads(r.value) for r in view.published.read("dead_letter", 0, 0) if r.key == "impression/0/-1"]
    assert letter["key"] == opened[2][0] and "features" in letter["reason"]


def test_records_of_every_time_are_learned_and_leave_finite_state(tmp_path: Path) -> None:
    config = configuration(tmp_path, EVERYTHING)
    log, trainer = answered(config), Trainer(config, tmp_path)
    times = itertools.cycle((0, 1_000_000, -1, 4_102_444_800_000, 2**62, -(2**63), 1_059_000))
    emitted: set[str] = set()
    for number, start in enumerate(range(0, 240, 40)):
        records = [
            replace(record, time_ms=next(times))
            for topic in ("item", "impression", "feedback")
            for record in log.read(topic, 0, 0)[start : start + 40]
        ]
        wall_ms = 1_000_000 + 10_000 * number
        entry = Entry(step=number + 1, now_ms=wall_ms, ends={}, wall_ms=wall_ms)
        emitted |= {emission.request_id for emission in trainer.step(records, entry).emissions}
    last = trainer.step([], Entry(step=7, now_ms=1_200_000, ends={}, wall_ms=1_200_000))
    emitted |= {emission.request_id for emission in last.emissions}
    assert emitted == {f"r{n}" for n in range(60)} and not len(trainer.joiner)
    for name, table in trainer.tables.items():
        touched = table.touched("test")
        assert np.isfinite(table.export(touched.slots, touched.keys).values).all(), name


def test_a_trainer_whose_folder_was_deleted_outranks_what_it_published(log: MemoryLog, tmp_path: Path) -> None:
    clock = ManualClock(1_000_000)
    published = MemoryLog(clock)
    for epoch in (5, 6):
        delta = Delta(version=Version(epoch=epoch, step=2**40), covers_ms=0, schema="", dense=b"x", dense_version=1)
        published.append("parameters", [("0", chunk) for chunk in encode_delta(delta)])
    forged = Delta(version=Version(epoch=2**62, step=1), covers_ms=0, schema="", dense=b"x", dense_version=1)
    published.append("parameters", [("0", b"no delta"), *(("0", chunk) for chunk in encode_delta(forged))] * 100)
    assert newest_published(published, 0) == 6
    assert newest_published(published, 40) == 40
    assert take_epoch(tmp_path, published) == 7
    assert take_epoch(tmp_path, published) == 8
    assert newest_published(log, 3) == 3, "nothing was published"


def test_a_topic_that_is_shortened_while_epochs_are_looked_for_is_looked_at_again() -> None:
    class Shortened(MemoryLog):
        times = 0

        def read(self, topic: str, partition: int, offset: int, limit: int) -> Any:
            self.times += 1
            if self.times == 2:
                raise LogTruncated("parameters/0: offset 0 is outside 33..43")
            return super().read(topic, partition, offset, limit)

    published = Shortened(ManualClock(0))
    delta = Delta(version=Version(epoch=6, step=1), covers_ms=0, schema="", dense=b"x", dense_version=1)
    published.append("parameters", [("0", chunk) for chunk in encode_delta(delta)] * 20)
    assert newest_published(published, 0) == 6 and published.times > 2


def test_an_item_with_which_a_step_failed_is_left_out_of_the_catalogue_of_a_restart(
    log: MemoryLog, tmp_path: Path
) -> None:
    trainer = Trainer(configuration(tmp_path), tmp_path)
    items = log.read("item", 0, 0)[:3]
    report = trainer.step(items, Entry(step=1, now_ms=1, ends={}, without={"item/0/1": "it raised"}))
    assert [letter.record.offset for letter in report.dead_letters] == [1]
    again = Trainer(configuration(tmp_path), tmp_path)
    again.restore_small(orjson.loads(orjson.dumps(trainer.small_state(), option=orjson.OPT_SERIALIZE_NUMPY)))
    for item in items:
        again.known(item)
    assert [again.catalogue.row(item.key) is not None for item in items] == [True, False, True]
