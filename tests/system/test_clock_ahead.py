"""Time is bounded: a clock that was ahead, of whoever wrote the log or of the trainer itself, does not stop learning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.clock import ManualClock, SystemClock
from recsys.streams.sqlite_log import SqliteLog
from tests.system.embedded import wait_for
from tests.system.trainer_alone import LABELS, START_S, TrainerAlone, click

pytestmark = pytest.mark.system

DAY_MS = 86_400_000
AHEAD = """
import os, time
real = time.time_ns
if os.path.exists({path!r}):
    time.time_ns = lambda: real() + 86_400_000_000_000
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerAlone]:
    folder = tmp_path_factory.mktemp("clock")
    alone = TrainerAlone(folder, hook=AHEAD.format(path=str(folder / "ahead")))
    alone.items(10)
    try:
        yield alone
    finally:
        alone.close()


def learned_with_their_clicks(trainer: TrainerAlone, names: list[str]) -> None:
    """What is shown and clicked now is learned, and each click is a positive."""
    name = 'recsys_examples_total{label="1",task="click"}'
    labels, clicks = trainer.metric("recsys_examples_total"), trainer.metric(name)
    trainer.shows(names)
    trainer.learns(int(labels) + LABELS * len(names))
    assert trainer.metric(name) == clicks + len(names), trainer.said()


def test_a_trainer_whose_clock_was_a_day_ahead_goes_on_from_now(trainer: TrainerAlone, tmp_path: Path) -> None:
    ahead = trainer.folder / "ahead"
    ahead.touch()
    trainer.start()
    trainer.log.append("impression", [("u", trainer.impression("ahead"))])
    trainer.learns(LABELS)  # by that clock the window is over at once
    assert trainer.stop() == 0
    ahead.unlink()
    trainer.start()
    learned_with_their_clicks(trainer, ["a", "b"])
    assert trainer.metric("recsys_time_set_back_total") == 1
    assert "by a clock that was ahead: it goes on from now" in trainer.said()


def test_records_stamped_a_day_ahead_are_as_of_now_and_learning_goes_on(trainer: TrainerAlone) -> None:
    writer = SqliteLog(trainer.data / "log", clock=ManualClock(SystemClock().now_ms() + DAY_MS))
    writer.append("impression", [("u", trainer.impression("stamped"))])
    writer.append("feedback", [("u", click("stamped"))])
    writer.close()
    wait_for(lambda: trainer.metric("recsys_time_ahead_total") == 2, "both are counted", START_S)
    trainer.learns(3 * LABELS)
    for name in ("c", "d", "e"):  # the embedded log's times stand still from now on, the trainer's do not
        learned_with_their_clicks(trainer, [name])
    assert trainer.metric('recsys_examples_total{label="1",task="click"}') == 2 + 1 + 3
    assert trainer.metric("recsys_time_set_back_total") == 1
