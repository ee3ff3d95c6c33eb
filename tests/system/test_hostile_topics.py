"""Internal topics are input: whatever is written into them, the trainer goes on, and learns all that is valid."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from recsys.bandit.served import Served
from recsys.features.build import encode
from tests.mutations import mutated
from tests.system.embedded import wait_for
from tests.system.trainer_alone import ITEMS, LABELS, SMALL, START_S, TrainerAlone, click, features

pytestmark = pytest.mark.system

EXPLORES = SMALL + "retrieval = { sources = { covisited = 20, bandit = 20 } }\n"
MIB = 2**20


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerAlone]:
    alone = TrainerAlone(tmp_path_factory.mktemp("hostile"), EXPLORES)
    alone.items(10)
    try:
        yield alone.start()
    finally:
        alone.close()


def everything_is_read(trainer: TrainerAlone) -> float:
    """Wait until the trainer has read all there is, and closed what it opened; the labels that it has learned."""
    before = len(trainer.records("dead_letter"))
    for topic in ("item", "impression", "feedback"):
        trainer.log.append(topic, [("end", b"the end")])

    def ends() -> int:
        return sum(json.loads(record.value)["key"] == "end" for record in trainer.records("dead_letter")[before:])

    wait_for(lambda: ends() == 3, "everything read", START_S)
    age = trainer.metric("recsys_checkpoint_age_seconds")
    wait_for(lambda: trainer.metric("recsys_checkpoint_age_seconds") != age, "gauges of now", START_S)
    wait_for(lambda: trainer.metric("recsys_open_impressions") == 0, "everything closed", START_S)
    return trainer.metric("recsys_examples_total")


def valid_is_learned(trainer: TrainerAlone, names: list[str]) -> None:
    before = everything_is_read(trainer)
    trainer.shows(names)
    trainer.learns(int(before) + LABELS * len(names))
    assert trainer.metric("recsys_step_failures_total") == 0, trainer.said()


def explored(trainer: TrainerAlone, request_id: str) -> bytes:
    """A valid impression that says what the bandit knew, too."""
    served = Served(
        generation="g1",
        clusters=np.arange(2),
        weights=np.array([0.6, 0.4], np.float32),
        vector=np.ones(4, np.float32),
        edges=np.ones(ITEMS, np.uint64),
    )
    message = json.loads(trainer.impression(request_id))
    return json.dumps(message | {"bandit": base64.b64encode(served.encode()).decode()}).encode()


def test_every_length_count_and_number_of_an_impression_is_compared_before_use(trainer: TrainerAlone) -> None:
    whole = features(trainer.schema, "bad", ITEMS)
    past = whole.user
    longer = {
        name: np.repeat(getattr(past, name), 100, 0)
        for name in ("history_keys", "history_mask", "history_kinds", "history_gaps")
    }
    bad = {
        "fewer": features(trainer.schema, "bad", ITEMS - 1),
        "more": features(trainer.schema, "bad", ITEMS + 1),
        "long": replace(whole, user=replace(past, **longer)),
        "huge": replace(whole, numbers=whole.numbers + np.float32(1e30)),
        "none": replace(whole, numbers=whole.numbers * np.float32("nan")),
        "kinds": replace(whole, user=replace(past, history_kinds=past.history_kinds + np.uint8(2))),
    }
    for name, value in bad.items():
        message = json.loads(trainer.impression(name)) | {"features": base64.b64encode(encode(value)).decode()}
        trainer.log.append("impression", [("u", json.dumps(message).encode())])
        trainer.log.append("feedback", [("u", click(name))])
    valid_is_learned(trainer, ["a", "b"])
    letters = [letter for letter in trainer.letters() if letter["key"] != "end"]
    assert len(letters) == len(bad)
    assert all("features: " in str(letter["reason"]) for letter in letters)


def test_a_dead_letter_fits_its_topic_however_large_the_record_was(trainer: TrainerAlone) -> None:
    before = len(trainer.letters())
    for topic in ("item", "impression", "feedback"):
        trainer.log.append(topic, [("k" * 300, b"\xff" * size) for size in (MIB, 786_000, 300_000)])
    valid_is_learned(trainer, ["c", "d"])
    letters = [r for r in trainer.records("dead_letter")[before:] if b'"key":"kkk' in r.value]
    assert len(letters) == 9
    assert all(len(record.value) < MIB * 0.9 for record in letters)
    largest = json.loads(letters[0].value)
    assert largest["value_bytes"] == MIB and len(largest["value_blake2b"]) == 32


def test_mutated_messages_of_all_topics_end_nothing(trainer: TrainerAlone) -> None:
    rng = np.random.default_rng(5)
    valid = {
        topic: [r.value for r in trainer.records(topic) if r.value[:1] == b"{"][:8] for topic in ("item", "feedback")
    }
    valid["impression"] = [explored(trainer, f"explored-{n}") for n in range(8)]
    for _ in range(15):
        for topic, messages in valid.items():
            changed = [mutated(messages[rng.integers(len(messages))], rng) for _ in range(10)]
            trainer.log.append(topic, [("u", message) for message in changed])
        trainer.log.append("impression", [("u", valid["impression"][0])])
    valid_is_learned(trainer, ["e", "f", "g"])
    assert trainer.stop() == 0, trainer.said()
