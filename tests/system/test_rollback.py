"""A bad model does not reach users; trainer and serving go back to a kept checkpoint. One story, through commands and HTTP."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from recsys.testing.world import World
from tests.system.embedded import Embedded, recsys, wait_for

pytestmark = pytest.mark.system
LONG_S = 240.0
OPTIONS = """
tasks = [{ name = "click", types = ["click"], window_s = 0.5 }]
training.checkpoint_s = 1
training.hold_examples = 1000
training.dense_publish_s = 0.5
parameter.snapshot_s = 2
retrieval.rebuild_s = 1000
ranking.exclude = "none"
"""


class Story(Embedded):
    """A system, the users' world, and what was said."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, OPTIONS)
        self.plain = self.config.read_text(encoding="utf-8")
        self.world = World(3, num_users=20, num_items=80, num_kinds=6)
        self.newest: dict[str, Any] = {}

    def turn(self) -> None:
        """Some users look and click."""
        for _ in range(6):
            user = self.world.any_user()
            self.newest = self.call("POST", "/v1/recommend", {"user_id": self.world.users[user], "n": 20})
            ids = [item["item_id"] for item in self.newest["items"]]
            clicks = zip(ids, self.world.clicks(user, ids), strict=True)
            request_id = self.newest["request_id"]
            events = [
                {
                    "event_id": f"{request_id}-{i}",
                    "user_id": self.world.users[user],
                    "item_id": i,
                    "request_id": request_id,
                }
                for i, hit in clicks
                if hit
            ]
            if events:
                self.click(*events)
        time.sleep(0.05)  # a trainer's turn

    def until(self, done: Any, what: str) -> Any:
        """Traffic goes on until something is so."""

        def turned() -> Any:
            self.turn()
            return done()

        return wait_for(turned, what, LONG_S)

    def checkpoints(self) -> list[dict[str, Any]]:
        done = recsys("checkpoint", "list", "--config", self.config, "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)["checkpoints"]
        return found

    def restart(self, more: str = "") -> None:
        self.stop()
        self.config.write_text(self.plain + more, encoding="utf-8")
        self.start()

    @property
    def step(self) -> int:
        """What the last answer was made with."""
        return int(self.newest["model_version"].split(".")[1])

    @property
    def held(self) -> bool:
        try:
            return bool(self.metric("recsys_model_held", "trainer"))
        except httpx.HTTPError:
            return False  # the trainer is down

    def trainer_says(self) -> str:
        return httpx.get(f"{self.url('trainer')}/readyz", timeout=5.0).text


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    system = Story(tmp_path_factory.mktemp("rollback"))
    try:
        system.start()
        items = [
            {"item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)} for i in system.world.items()
        ]
        system.call("PUT", "/v1/items", {"items": items})
        yield system
    finally:
        system.close()


def test_a_bad_model_is_held_back_and_released_by_a_rollback(story: Story) -> None:
    story.until(
        lambda: story.metric("recsys_examples_total", "trainer") > 4000, "a model that is better than the constant"
    )
    good = [one for one in story.checkpoints() if one["good"]]
    assert good and all(one["whole"] and one["learnable"] is not None for one in good)

    story.restart("model.dense_learning_rate = 30.0\nmodel.row_learning_rate = 30.0\n")  # somebody's mistake
    story.until(lambda: story.held, "the model is held back")
    assert not story.ready("trainer") and "model held back" in story.trainer_says()
    story.until(
        lambda: story.step in {one["id"] for one in story.checkpoints() if one["good"]}, "the last good one is served"
    )
    served = {story.step}
    kept = [one for one in story.checkpoints() if one["good"]]

    psutil.Process(story.pids()["trainer"]).send_signal(signal.SIGKILL)
    wait_for(lambda: not story.ready("trainer"), "it is down")
    story.until(lambda: story.held, "held back again after a kill")
    story.turn()
    assert {story.step} == served and not story.ready("trainer")

    story.restart()
    to = [one["id"] for one in story.checkpoints() if one["good"]][-1]  # it stays; newer ones may go meanwhile
    done = recsys("rollback", "--config", story.config, "--to", str(to), "--skip", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["to"] == to, done.stderr
    story.until(lambda: story.ready("trainer") and not story.held, "released")
    story.until(lambda: story.step > max(one["id"] for one in kept), "what is learned is served again")


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(story: Story) -> None:
    ids = [str(one["id"]) for one in story.checkpoints()]
    done = recsys("rollback", "--config", story.config, "--to", "123456789", "--learn")
    ids += [str(one["id"]) for one in story.checkpoints()]  # one may have come, and another gone, meanwhile
    assert done.returncode == 2 and "recsys checkpoint list" in done.stderr and any(i in done.stderr for i in ids)


def test_what_came_after_can_be_learned_again_and_all_is_accounted_for(story: Story) -> None:
    story.until(lambda: story.metric("recsys_checkpoint_seconds_count", "trainer") > 3, "checkpoints")
    epoch = story.metric("recsys_trainer_epoch", "trainer")

    def went_back() -> Any:
        """The newest, which may be gone before it is asked for; once the command says yes, it stays."""
        newest = story.checkpoints()[0]
        assert newest["learnable"] is not None
        done = recsys("rollback", "--config", story.config, "--to", str(newest["id"]), "--learn")
        assert done.returncode in (0, 2), done.stderr
        return None if done.returncode else newest

    to = story.until(went_back, "a checkpoint that is still there when it is asked for")
    story.until(lambda: story.metric("recsys_trainer_epoch", "trainer") > epoch, "a new epoch")
    story.until(lambda: story.step > to["id"] + 1, "learning goes on")
    story.until(
        lambda: len([c for c in story.checkpoints()[:2] if c["id"] > to["id"] + 1]) == 2, "two checkpoints since"
    )
    story.stop()
    audit = recsys("audit", "--config", story.config, "--json")
    assert audit.returncode == 0, audit.stdout
    replay = recsys("audit", "--replay", "--config", story.config, "--json")
    assert replay.returncode == 0 and json.loads(replay.stdout)["equal"], replay.stdout
    story.start()
