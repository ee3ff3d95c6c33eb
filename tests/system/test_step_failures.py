"""A step happens or does not: what makes it raise, or ends the process, is buried, and everything else is learned."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from recsys.training.journal import Journal
from tests.system.embedded import wait_for
from tests.system.trainer_alone import LABELS, START_S, TrainerAlone, click

pytestmark = pytest.mark.system

HOOK = """
import os, signal, time
import orjson
loads = orjson.loads
def hooked(data):
    if os.path.exists(SLOW): time.sleep(0.5)
    if isinstance(data, bytes) and b'"raises' in data: raise RuntimeError("a fault that nobody foresaw")
    if isinstance(data, bytes) and b'"kills' in data: os.kill(os.getpid(), signal.SIGKILL)
    return loads(data)
orjson.loads = hooked
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerAlone]:
    folder = tmp_path_factory.mktemp("steps")
    alone = TrainerAlone(folder, hook=f"SLOW = {str(folder / 'slow')!r}\n{HOOK}")
    alone.items(10)
    try:
        yield alone
    finally:
        alone.close()


def test_a_record_that_makes_a_step_raise_is_buried_and_the_rest_of_it_is_learned(trainer: TrainerAlone) -> None:
    trainer.log.append("impression", [(n, trainer.impression(n)) for n in ("a", "raises-1", "b")])
    trainer.log.append("feedback", [("u", click(n)) for n in ("a", "raises-2", "b")])
    trainer.start()
    trainer.learns(2 * LABELS)
    assert trainer.metric('recsys_examples_total{label="1",task="click"}') == 2
    assert trainer.metric("recsys_step_failures_total") == 2
    letters = trainer.letters()
    assert [(letter["topic"], letter["offset"]) for letter in letters] == [("impression", 1), ("feedback", 1)]
    assert {letter["reason"] for letter in letters} == {"RuntimeError: a fault that nobody foresaw"}
    for topic in ("impression", "feedback"):
        assert trainer.metric(f'recsys_dead_letters_total{{reason="failed",topic="{topic}"}}') == 1


def test_a_step_that_ended_two_processes_is_learned_by_the_third_without_what_ended_them(trainer: TrainerAlone) -> None:
    process = trainer.process
    assert process is not None and process.poll() is None
    before = len(trainer.letters())
    trainer.log.append("impression", [("u", trainer.impression("c"))])
    trainer.log.append("feedback", [("u", click("c")), ("u", click("c", event_id="kills"))])
    for _ in range(2):
        assert process.wait(START_S) == -9, trainer.said()
        process = trainer.spawn()
    wait_for(trainer.ready, "the third process ready", START_S)
    trainer.learns(LABELS)
    assert trainer.metric('recsys_examples_total{label="1",task="click"}') == 1
    (letter,) = trainer.letters()[before:]
    assert (letter["topic"], letter["offset"], letter["reason"]) == ("feedback", 4, "the process was ended by signal 9")
    assert trainer.stop() == 0, trainer.said()
    saved = json.loads((trainer.data / "trainer" / "manifest.json").read_text())
    assert saved["step"] == list(Journal(trainer.data / "trainer").entries(1))[-1].step, "every step is in a checkpoint"


def test_a_trainer_that_restores_for_long_stops_when_told_to(trainer: TrainerAlone) -> None:
    (trainer.folder / "slow").touch()  # 10 items, half a second each
    process = trainer.spawn()
    why = wait_for(trainer.why_not_ready, "why it is not ready", START_S)
    assert why == "restoring"
    started_s = time.monotonic()
    process.terminate()
    assert process.wait(START_S) == 0, trainer.said()
    assert time.monotonic() - started_s < 10
