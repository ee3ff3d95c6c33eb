"""`recsys audit`: a record removed, a label repeated, a delta dropped, a row changed: each is found; an honest system closes."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest

from recsys.files import Manifests, read_file, write_file
from recsys.parameters.deltas import numbered
from recsys.testing.world import World
from tests.system.embedded import Embedded, recsys, wait_for

pytestmark = pytest.mark.system
OPTIONS = (
    'tasks = [{ name = "click", types = ["click"], window_s = 1.0 }, { name = "like", types = ["like"], window_s = 600 }]\n'
    "training.checkpoint_s = 2\nparameter.snapshot_s = 2\n"
)
SHOWN = 8


class Audited(Embedded):
    """A system and what it said while it ran."""

    shown = 0


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """A system that answered, was clicked and stopped; what it said while it ran."""
    system = Audited(tmp_path_factory.mktemp("audited"), OPTIONS)
    world = World(3, num_users=20, num_items=80, num_kinds=6)
    try:
        system.start()
        items = [{"item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)} for i in world.items()]
        system.call("PUT", "/v1/items", {"items": items})
        wait_for(lambda: answer_and_click(system, world), "answers")
        system.click({"event_id": "nobody", "user_id": "u", "item_id": "item-1", "request_id": "invented"})
        checkpoints = 0.0
        while checkpoints < 3:  # the re-run begins with the one before the newest
            answer_and_click(system, world)
            checkpoints = system.metric("recsys_checkpoint_seconds_count", "trainer")
        running = audit(system)
        assert running[0] == 0 and running[1]["closes"], running
        while True:
            for _ in range(3):
                answer_and_click(system, world)
            system.stop()
            if len(rerun_feedback(system.data)) > 1:
                break
            system.start()  # a checkpoint came just before the stop
        yield system
    finally:
        system.close()


def answer_and_click(system: Audited, world: World) -> int:
    user = world.any_user()
    answer = system.call("POST", "/v1/recommend", {"user_id": world.users[user], "n": SHOWN})
    ids = [item["item_id"] for item in answer["items"]]
    clicks = [
        {"event_id": f"{answer['request_id']}-{i}", "user_id": world.users[user], "item_id": i}
        for i, hit in zip(ids, world.clicks(user, ids), strict=True)
        if hit
    ]
    system.shown += len(ids)
    system.click(*({**click, "request_id": answer["request_id"]} for click in clicks))
    return len(ids)


def rerun_feedback(data: Path) -> range:
    """Offsets of feedback that a re-run reads: from the checkpoint before the newest to it."""
    found = [manifest["positions"]["feedback/0"] for manifest in Manifests(data / "trainer").look()]
    return range(found[1], found[0]) if len(found) > 1 else range(0)


def audit(system: Embedded, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the one JSON object alone on stdout."""
    done = recsys("audit", "--config", system.config, "--json", *more)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def changed(audited: Embedded, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Let a test change the data folder; it is as it was afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(audited.data, kept)
    yield lambda: audited.data
    shutil.rmtree(audited.data)
    shutil.copytree(kept, audited.data)


def test_an_honest_system_closes_and_its_state_is_what_the_log_makes(audited: Audited) -> None:
    code, ledger = audit(audited)
    assert code == 0 and ledger["closes"] and not ledger["why"]
    shown = ledger["partitions"]["impression/0"]
    feedback = ledger["partitions"]["feedback/0"]
    assert shown["accepted"] == shown["learned"] > 0 and feedback["accepted"] == feedback["taken"]
    assert feedback["waiting"] == 1  # whose request was invented
    click, like = ledger["labels"]["click"], ledger["labels"]["like"]
    assert click["opened"] == click["positive"] + click["negative"] + click["waiting"]
    assert audited.shown - 3 * SHOWN <= click["opened"] <= audited.shown, (
        "the stop may have come before the last answers"
    )
    assert like["waiting"] == like["opened"]
    code, again = audit(audited, "--replay")
    assert code == 0 and again["equal"] and again["to_step"] > again["from_step"], again
    assert again["served_step"] >= 0


def test_a_record_removed_from_the_log_is_found(audited: Embedded, changed: Callable[[], Path]) -> None:
    with sqlite3.connect(changed() / "log" / "feedback.db") as log:
        log.execute("DELETE FROM log WHERE seq = ?", (rerun_feedback(audited.data)[0],))
    code, ledger = audit(audited)
    assert code == 1 and not ledger["closes"]
    assert not ledger["partitions"]["feedback/0"]["closes"] and ledger["partitions"]["impression/0"]["closes"]
    assert any(why.startswith("feedback/0: ") for why in ledger["why"])
    assert audit(audited, "--replay")[0] == 1


def test_a_label_that_was_counted_twice_is_found(audited: Embedded, changed: Callable[[], Path]) -> None:
    folder = changed() / "trainer"

    def repeat(small: dict[str, Any]) -> None:
        small["trainer"]["ledger"]["labels"]["click"]["positive"] += 1

    edit_small(folder, repeat)
    code, ledger = audit(audited)
    assert code == 1 and not ledger["labels"]["click"]["closes"] and ledger["labels"]["like"]["closes"]
    code, again = audit(audited, "--replay")
    assert code == 1 and "small state differs: ledger" in again["differences"]


def test_a_delta_that_was_dropped_is_found(audited: Embedded, changed: Callable[[], Path]) -> None:
    path = changed() / "log" / "parameters.db"
    with sqlite3.connect(path) as log:
        found = [(seq, numbered(value)) for seq, value in log.execute("SELECT seq, value FROM log ORDER BY seq")]
        # The fixture may have started it again: what the last delta of an epoch was only its trainer knows.
        one = next(of for (_, of), (_, later) in pairwise(found[1:]) if of.number + 1 == later.number > 2)
        log.executemany(
            "DELETE FROM log WHERE seq = ?",
            [(seq,) for seq, other in found if (other.version.epoch, other.number) == (one.version.epoch, one.number)],
        )
    code, ledger = audit(audited)
    assert code == 1 and ledger["parameters"]["missing"] == 1, ledger["parameters"]


def test_a_folder_without_a_trainer_is_bad_input(tmp_path: Path) -> None:
    done = recsys("audit", "--config", Embedded(tmp_path / "empty").config)
    assert done.returncode == 2 and "no trainer ever ran" in done.stderr


def edit_small(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the newest checkpoint's small state as somebody would who knows its checksum."""
    manifests = Manifests(folder)
    manifest = next(iter(manifests.look()))
    small = orjson.loads(read_file(folder / manifest["small"]["name"], manifest["small"]["checksum"]))
    change(small)
    older = manifests.previous.read_bytes()
    manifests.write({**manifest, "small": write_file(folder / "small-edited.json", orjson.dumps(small))})
    manifests.previous.write_bytes(older)
