"""Another configuration on a trainer's folder: rows stay what they are, predictions begin where they were, no label is lost."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from recsys.clock import ManualClock
from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.events import messages
from recsys.features.build import Features, decode
from recsys.features.convert import Conversion, slot_names
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.streams.memory_log import MemoryLog
from recsys.table import segments
from recsys.table.rows import round_nearest
from recsys.table.segments import LayoutDelta
from recsys.testing.crash import Abort, AbortAt
from recsys.training.migration.succession import would
from recsys.training.rerun import rerun
from recsys.training.runner import Runner
from recsys.training.trainer import Trainer
from services.cli.main import main
from services.common.process import FolderLock
from tests.unit.test_trainer import END, EVERYTHING, Slowly, answered, configuration, turns

MIDDLE = 1_000_000 + 40_000
BASE: Mapping[str, Any] = MappingProxyType({"table": {"capacity": 20_000, "expiry_s": 3000, "admission": 2}})
TASKS = [
    {"name": "click", "types": ["click"], "window_s": 2},
    {"name": "like", "types": ["like"], "window_s": 5, "prior": 0.02},
]
ATTRIBUTES = {"attributes": ["brand", "category", "tags"], "multivalued": ["tags"]}
MODEL = {"dim": 4, "expert_hidden": [8, 4], "attention": [8], "tower_dim": 4}
ADDITIONS: dict[str, Mapping[str, Any]] = {
    "attribute": {"catalogue": ATTRIBUTES},
    "context field, number and cross": {
        "features": {
            "context": ["device"],
            "numbers": ["price"],
            "crosses": [["user", "category"], ["user", "tags"], ["history", "item"], ["device", "item"]],
        }
    },
    "history attribute": {"catalogue": ATTRIBUTES, "features": {"history_attributes": ["brand", "category", "tags"]}},
    "counter": {"features": {"counters": [{"of": ["category"]}, {"of": ["user"]}, {"of": ["item"]}]}},
    "half-life": {"features": {"counters": [{"of": ["user"], "half_lives_s": [60]}, {"of": ["item"]}]}},
    "task in its own group": {"tasks": [{"name": "buy", "types": ["purchase"], "window_s": 3, "group": "buy"}, *TASKS]},
    "task in a group": {"tasks": [*TASKS, {"name": "again", "types": ["click"], "window_s": 9}]},
    "dim": {"model": {**MODEL, "dim": 7}},
    "admission": {"table": {**BASE["table"], "admission": 5}},
    "filter": {"table": {**BASE["table"], "filter_counters": 4096}},
    "precision": {"table": {**BASE["table"], "precision": "bfloat16", "rounding": "stochastic"}},
    "history": {"features": {"history_len": 40, "time_gaps": True, "cross_history": 9}},
    "correctors": {"model": {**MODEL, "calibrate": True, "error_memory": 0.3, "row_l2": 0.1}},
}
ADDITIONS["all at once"] = {
    "catalogue": ATTRIBUTES,
    "features": {"context": ["device"], "counters": [{"of": ["category"]}, {"of": ["user"]}, {"of": ["item"]}]},
    "tasks": [*TASKS, {"name": "buy", "types": ["purchase"], "window_s": 3, "group": "buy"}],
    "model": {**MODEL, "dim": 8},
}


class Learned:
    """A folder in which a trainer of one configuration learned half of a log, and stopped while labels waited."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.config = configuration(folder, options)
        self.log = answered(self.config)
        clock = ManualClock(1_000_000)
        runner = Runner(self.config, Slowly(self.log, clock), clock)  # type: ignore[arg-type]
        runner.start()
        for _ in turns(runner, clock, MIDDLE):
            pass
        self.rows, _ = segments.take(runner.trainer.tables, "test")
        self.features = self.logged()
        self.predicted = runner.trainer.learner.predict(self.features)
        self.steps, self.open = runner.trainer.steps, len(runner.trainer.joiner)
        assert self.open > 0 and len(self.rows["deep"].rows.keys) > 50
        # As after kill -9: there are steps in the journal behind the checkpoint.
        killed(runner)

    def logged(self) -> list[Features]:
        schema = Schema.of(self.config)
        found = (messages.parse_impression(r.value) for r in self.log.read("impression", 0, 0))
        return [decode(schema, one.features) for one in found if one.features][-20::5]

    def copy(self, folder: Path, options: Mapping[str, Any]) -> Config:
        """The configuration with other options, on a copy of the folder."""
        shutil.copytree(self.folder / "trainer", folder / "trainer", dirs_exist_ok=True)
        return configuration(folder, {**self.options, **options})

    def start(self, config: Config, now_ms: int = MIDDLE, **more: Any) -> tuple[Runner, Slowly]:
        clock = ManualClock(now_ms)
        view = Slowly(self.log, clock)
        runner = Runner(config, view, clock, **more)  # type: ignore[arg-type]
        runner.start()
        return runner, view


def killed(runner: Runner) -> None:
    """Close its files, and write nothing."""
    runner.trainer.close()
    runner.checkpoints.close()
    runner.journal.close()


def go_on(view: Slowly, runner: Runner) -> None:
    """To the log's end, and until every window closed."""
    while view._clock.now_ms() < END:
        view._clock.advance(3000)
        runner.turn()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return Learned(tmp_path_factory.mktemp("learned"), BASE)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    table = {"capacity": 20_000, "expiry_s": 3000}
    return Learned(tmp_path_factory.mktemp("everything"), {**EVERYTHING, "table": table})


def by_name(config: Config, part: LayoutDelta, layout: str) -> dict[tuple[str, int], int]:
    """Where each row lies, by the name of its slot and its key."""
    names = [*slot_names(Schema.of(config)), "unused"]
    slots = part.rows.slots.tolist()
    texts = [str(slot) if layout == "edge" else names[slot] for slot in slots]
    return {key: at for at, key in enumerate(zip(texts, part.rows.keys.tolist(), strict=True))}


def columns(config: Config, layout: str) -> list[tuple[str, Any]]:
    """A name of each value of a row."""
    (found,) = [one for one in layouts(config, Schema.of(config)) if one.name == layout]
    tasks = [task.name for task in config.tasks]
    return [(s.name, n) for s in found.segments for n in (tasks if s.name == "wide" else range(s.dim))]


def same_rows(before: Config, old: Mapping[str, LayoutDelta], trainer: Trainer) -> int:
    """Check that every row of a slot that both have is bit for bit what it was, and 0 in what it has more; how many."""
    after, checked = trainer.config, 0
    new, _ = segments.take(trainer.tables, "test-rows")
    for layout, part in old.items():
        mine, theirs = by_name(after, new[layout], layout), by_name(before, part, layout)
        slots = set(slot_names(Schema.of(after)))
        kept = [key for key in theirs if layout == "edge" or key[0] in slots]
        assert set(kept) == set(mine)
        a, b = (np.array([where[key] for key in kept], np.intp) for where in (mine, theirs))
        was, becomes = columns(before, layout), columns(after, layout)
        values = new[layout].rows.values[a]
        expected = np.zeros_like(values)
        for at, name in enumerate(becomes):
            if name in was:
                expected[:, at] = part.rows.values[b][:, was.index(name)]
        precision = trainer.tables[layout].layout.precision
        np.testing.assert_array_equal(values, round_nearest(expected, precision))
        np.testing.assert_array_equal(new[layout].rows.last_seen_ms[a], part.rows.last_seen_ms[b])
        np.testing.assert_array_equal(new[layout].rows.uses[a], part.rows.uses[b])
        width = part.rows.state.shape[1]
        if new[layout].rows.state.shape[1] == width:
            np.testing.assert_array_equal(new[layout].rows.state[a], part.rows.state[b])
        checked += len(kept)
    return checked


def predictions_move(old: Learned, trainer: Trainer) -> float:
    """How far predictions of the old tasks are from what they were, at most."""
    conversion = Conversion(Schema.of(old.config), trainer.schema)
    predicted = trainer.learner.predict([conversion.features(f) for f in old.features])
    at = [trainer.schema.tasks.index(task.name) for task in old.config.tasks]
    assert np.ptp(old.predicted) > 1e-3, "nothing was learned"
    return float(np.abs(predicted[:, at] - old.predicted).max())


@pytest.mark.parametrize("kind", ADDITIONS)
def test_an_addition_keeps_rows_and_predictions(kind: str, learned: Learned, tmp_path: Path) -> None:
    runner, view = learned.start(learned.copy(tmp_path, ADDITIONS[kind]))
    assert runner.succession.done is not None and runner.trainer.steps == learned.steps
    assert same_rows(learned.config, learned.rows, runner.trainer) > 100
    assert predictions_move(learned, runner.trainer) <= (5e-3 if kind == "precision" else 1e-6)
    assert len(runner.trainer.joiner) == learned.open
    view._clock.advance(9000)
    assert runner.turn(), "it learns on"


@pytest.mark.parametrize("kind", ["attribute", "task in a group", "all at once"])
def test_every_label_is_learned_once_across_a_change(kind: str, learned: Learned, tmp_path: Path) -> None:
    config = learned.copy(tmp_path, ADDITIONS[kind])
    emitted: list[tuple[str, int]] = []

    def on_step(report: Any, _: float) -> None:
        for emission in report.emissions:
            emitted.extend((emission.request_id, task) for task in np.flatnonzero(emission.final.any(0)).tolist())

    runner, view = learned.start(config, on_step=on_step)
    go_on(view, runner)
    runner.close()
    # Every impression that was open or unread had the old features; each label is learned once.
    assert len(set(emitted)) == len(emitted)
    click = runner.trainer.schema.tasks.index("click")
    assert {name for name, task in emitted if task == click} >= {f"r{n}" for n in range(40, 60)}
    assert not len(runner.trainer.joiner)
    letters = [r.key for r in view.published.read("dead_letter", 0, 0)]
    assert letters == []
    for task, labels in runner.trainer.ledger.labels.items():
        known = sum(labels[name] for name in ("positive", "negative", "masked"))
        assert known == labels["opened"], task


def test_additions_to_a_model_with_every_option_on(everything: Learned, tmp_path: Path) -> None:
    more = {
        "catalogue": ATTRIBUTES,
        "features": {
            **everything.options["features"],
            "context": ["device"],
            "history_attributes": ["brand", "category", "tags"],
        },
        "model": {**EVERYTHING["model"], "dim": 6},
    }
    runner, view = everything.start(everything.copy(tmp_path, more))
    assert same_rows(everything.config, everything.rows, runner.trainer) > 100
    assert predictions_move(everything, runner.trainer) <= 1e-6
    go_on(view, runner)
    with pytest.raises(SchemaMismatch, match="error_memory begins anew"):
        tasks = [*EVERYTHING["tasks"], {"name": "buy", "types": ["purchase"]}]
        everything.start(everything.copy(tmp_path / "task", {**more, "tasks": tasks}))


REMOVALS: dict[str, tuple[Mapping[str, Any], str]] = {
    "attribute": ({"catalogue": {"attributes": ["category"], "multivalued": []}}, "removed attribute 'tags'"),
    "task": ({"tasks": TASKS[:1]}, "removed task 'like'"),
    "counter": ({"features": {"counters": [{"of": ["item"]}]}}, "removed counter 'user' of 86400 s"),
    "group": ({"tasks": [TASKS[0], {**TASKS[1], "group": "other"}]}, "group of task 'like'"),
}


@pytest.mark.parametrize("kind", REMOVALS)
def test_a_removal_is_refused_until_it_is_asked_for(kind: str, learned: Learned, tmp_path: Path) -> None:
    options, said = REMOVALS[kind]
    if kind == "attribute":
        features = {"history_attributes": ["category"], "crosses": [["user", "category"], ["history", "item"]]}
        options = {**options, "features": features}
    config = learned.copy(tmp_path, options)
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "trainer").rglob("*"))
    with pytest.raises(SchemaMismatch, match=f"recsys checkpoint migrate --dry-run.*{said}"):
        learned.start(config)
    names = {path.name for path in (tmp_path / "trainer").rglob("*")}
    assert {name for name, _ in before} - names <= {"epoch-00000001"}
    migrated = would(config, tmp_path / "trainer")
    assert migrated is not None and any(said in change.text and change.loses for change in migrated.changes)
    assert bool(migrated.dropped) == (kind == "attribute")
    asked = Runner(config, learned.log, ManualClock(MIDDLE))
    asked.succession.may_lose = True
    asked.succession.load(asked.checkpoints)
    killed(asked)
    runner, _ = learned.start(config)
    assert runner.succession.done is None and runner.trainer.steps == learned.steps
    same_rows(learned.config, learned.rows, runner.trainer)


def test_the_command_says_what_it_would_do_and_waits_for_the_trainer_to_be_stopped(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned.copy(tmp_path, {})
    file = tmp_path / "other.toml"
    file.write_text(
        f'data_dir = {json.dumps(str(tmp_path))}\nfeatures.counters = [{{ of = ["item"] }}]\ntable.admission = 2\n'
        'tasks = [{ name = "click", types = ["click"], window_s = 2 }, '
        '{ name = "like", types = ["like"], window_s = 5, prior = 0.02 }]\n'
        "model = { dim = 4, expert_hidden = [8, 4], attention = [8], tower_dim = 4 }\n"
    )
    command = ["checkpoint", "migrate", "--json", "--config", str(file)]
    assert main([*command, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said["migrated"] and sum(said["kept"].values()) > 100 and not said["dropped"]
    assert {"what": "removed counter 'user' of 86400 s: its weights are dropped", "loses": True} in said["changes"]
    lock = FolderLock(tmp_path, "trainer")
    assert main(command) == 2 and "another running trainer: stop it" in capsys.readouterr().err
    lock.release()


def test_what_no_migration_can_keep_is_refused_by_name(learned: Learned, tmp_path: Path) -> None:
    wrong: tuple[dict[str, Any], ...] = ({"experts": 3}, {"attention": [4]})
    for number, model in enumerate(wrong):
        config = learned.copy(tmp_path / str(number), {"model": {**MODEL, **model}})
        with pytest.raises(SchemaMismatch, match=r"model\.(experts|attention) was .* choose another data_dir"):
            learned.start(config)


@pytest.mark.parametrize("gap", ["segment written", "manifest renamed"])
def test_a_crash_in_between_is_made_up_for_by_either_configuration(gap: str, learned: Learned, tmp_path: Path) -> None:
    config = learned.copy(tmp_path, ADDITIONS["all at once"])
    with pytest.raises(Abort):
        learned.start(config, crash=AbortAt(gap, 1))
    if gap == "segment written":
        old = learned.copy(tmp_path / "old", {})
        shutil.copytree(tmp_path / "trainer", tmp_path / "old" / "trainer", dirs_exist_ok=True)
        runner, _ = learned.start(old)
        assert same_rows(learned.config, learned.rows, runner.trainer) > 100 and runner.trainer.steps == learned.steps
    runner, view = learned.start(config)
    assert same_rows(learned.config, learned.rows, runner.trainer) > 100
    assert predictions_move(learned, runner.trainer) <= 1e-6
    published = view.published.read("parameters", 0, 0, 1000)
    assert len(published) >= 2, "all is published anew"
    again, _ = learned.start(config)
    assert again.succession.done is None and again.trainer.steps == learned.steps


def test_a_torn_checkpoint_behind_a_change_is_made_up_for_by_the_one_before(learned: Learned, tmp_path: Path) -> None:
    config = learned.copy(tmp_path, ADDITIONS["all at once"])
    runner, view = learned.start(config)
    for _ in range(10):  # no other checkpoint
        view._clock.advance(700)
        runner.turn()
    steps, (rows, _) = runner.trainer.steps, segments.take(runner.trainer.tables, "test")
    killed(runner)
    newest = max((tmp_path / "trainer").glob("dense-*"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-8])
    again, _ = learned.start(config, view._clock.now_ms())
    assert again.succession.done is not None and again.trainer.steps == steps > learned.steps
    made, _ = segments.take(again.trainer.tables, "test")
    for layout, part in rows.items():
        order, other = (np.lexsort((r.keys, r.slots)) for r in (part.rows, made[layout].rows))
        np.testing.assert_array_equal(part.rows.values[order], made[layout].rows.values[other])
        np.testing.assert_array_equal(part.rows.state[order], made[layout].rows.state[other])


def test_the_audit_runs_a_change_again_and_finds_it_equal(learned: Learned, tmp_path: Path) -> None:
    config = learned.copy(tmp_path / "data", {**ADDITIONS["all at once"], **ADDITIONS["filter"]})
    runner, view = learned.start(config)
    killed(runner)
    found = rerun(config, view, ManualClock(MIDDLE), tmp_path / "scratch")  # type: ignore[arg-type]
    assert found.differences == () and found.end == learned.steps


def test_a_hundred_thousand_rows_are_carried_over_bit_for_bit(tmp_path: Path) -> None:
    before = configuration(tmp_path, {"table": {"capacity": 200_000, "expiry_s": 1e9}})
    log, clock = MemoryLog(ManualClock(1_000_000)), ManualClock(1_000_000)
    runner = Runner(before, log, clock)
    runner.start()
    rng = np.random.default_rng(1)
    for name, table in runner.trainer.tables.items():
        for slot in () if name == "edge" else sorted(table.layout.slots)[:4]:
            keys, slots = rng.integers(-(2**62), 2**62, 16_000), np.full(16_000, slot, np.int32)
            table.lookup_train(slots, keys, 1_000_000)
            gradients = rng.normal(size=(16_000, table.layout.dim)).astype(np.float32)
            table.apply_gradients(slots, keys, gradients, 1_000_000)
    rows, _ = segments.take(runner.trainer.tables, "test")
    assert sum(len(part.rows.keys) for part in rows.values()) > 100_000
    runner.trainer.steps += 1
    runner.close()
    after = configuration(tmp_path, {**ADDITIONS["all at once"], "table": {"capacity": 200_000, "expiry_s": 1e9}})
    again = Runner(after, log, clock)
    again.start()
    assert same_rows(before, rows, again.trainer) > 100_000
