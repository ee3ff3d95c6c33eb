"""The breaker: it opens when no feedback comes at all, says so, and an operator's word to it outlives the process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from recsys.clock import ManualClock, SystemClock
from tests.system.embedded import recsys, wait_for
from tests.system.trainer_alone import ITEMS, LABELS, SMALL, START_S, TrainerAlone, click

pytestmark = pytest.mark.system

EXAMPLES = 100
CLOCK = ManualClock(SystemClock().now_ms())
"""Of the log: what is appended at one time counts as of one time, however long it takes."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerAlone]:
    extra = SMALL + f"training.breaker_examples = {EXAMPLES}\n"
    alone = TrainerAlone(tmp_path_factory.mktemp("breaker"), extra, clock=CLOCK)
    alone.items(10)
    try:
        yield alone.start()
    finally:
        alone.close()


def silent(trainer: TrainerAlone, name: str) -> int:
    """Show as much as the breaker looks at, with no click; how many labels that is."""
    count = EXAMPLES // ITEMS + 5
    CLOCK.set(SystemClock().now_ms())
    trainer.log.append("impression", [("u", trainer.impression(f"{name}-{n}")) for n in range(count)])
    return count * LABELS


def opens(trainer: TrainerAlone, name: str) -> float:
    """Show with no click until it opens; the labels learned until then."""
    for turn in itertools.count():
        labels = trainer.metric("recsys_examples_total") + silent(trainer, f"{name}-{turn}")
        wait_for(lambda: is_open(trainer) or trainer.metric("recsys_examples_total") >= labels, "its labels", START_S)  # noqa: B023
        if is_open(trainer):
            break
    return trainer.metric("recsys_examples_total")


def is_open(trainer: TrainerAlone) -> bool:
    return "breaker open" in trainer.why_not_ready()


def test_feedback_that_comes_keeps_it_closed_whatever_becomes_of_it(trainer: TrainerAlone) -> None:
    CLOCK.set(SystemClock().now_ms())
    trainer.log.append("feedback", [("u", click(f"elsewhere-{n}")) for n in range(3)])
    names = [f"load-{n}" for n in range(EXAMPLES // ITEMS + 5)]
    trainer.log.append("impression", [("u", trainer.impression(name)) for name in names])
    trainer.learns(len(names) * LABELS)
    assert trainer.ready() and not trainer.metric("recsys_breaker_open")


def test_what_an_operator_says_outlives_the_process(trainer: TrainerAlone) -> None:
    opens(trainer, "silence")
    wait_for(lambda: trainer.metric("recsys_breaker_open"), "its gauge", START_S)
    assert "recsys trainer resume --learn | --skip" in trainer.why_not_ready()
    trainer.shows(["waits-1", "waits-2"])

    assert recsys("trainer", "resume", "--learn", "--config", trainer.file).returncode == 0
    wait_for(lambda: not is_open(trainer), "the breaker closed", START_S)
    assert trainer.process is not None
    trainer.process.kill()
    trainer.process.wait()
    trainer.start()  # ready: the breaker is closed
    CLOCK.set(SystemClock().now_ms())
    trainer.shows(["after-1"])
    wait_for(lambda: trainer.metric('recsys_examples_total{label="1",task="click"}') >= 1, "a click", START_S)
    assert not is_open(trainer)


def test_skipped_records_are_not_learned_and_those_after_them_are(trainer: TrainerAlone) -> None:
    before = opens(trainer, "silence again")
    trainer.shows([f"skipped-{n}" for n in range(10)])
    assert recsys("trainer", "resume", "--skip", "--config", trainer.file).returncode == 0
    wait_for(lambda: not is_open(trainer), "the breaker closed", START_S)
    CLOCK.set(SystemClock().now_ms())
    trainer.shows(["after-2"])
    trainer.learns(int(before) + LABELS)
    assert not (trainer.data / "trainer" / "resume").exists()
