"""The bandit in the loop: candidates in answers, what it chose by in the log, rewards in the parameter service within a second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy

from recsys.bandit.served import Served, decode
from recsys.events import messages
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model.plan import Block
from recsys.parameters.grpc_parameters import GrpcParameters
from recsys.types import Impression
from services.ranking.builder import NICE
from tests.system.embedded import ITEMS, wait_for
from tests.system.services import Services, now_ms, tasks

pytestmark = pytest.mark.system
WITHIN_S = 1.0


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Services]:
    extra = (
        tasks() + "retrieval.rebuild_s = 20\nbandit.neighbours = 20\nbandit.clusters = 4\nslate.draw_positions = [3]\n"
    )
    running = Services(tmp_path, extra)
    try:
        yield running.start()
    finally:
        running.close()


def users_click(system: Services, number: int) -> None:
    """A few users who like a category each, without requests: they train the towers."""
    now = now_ms()
    system.click(
        *(
            {
                "event_id": f"{number}-{user}-{n}",
                "user_id": f"user-{user}",
                "item_id": f"item-{user % 4 + 4 * n}",
                "time_ms": now,
            }
            for user in range(20)
            for n in range(10)
        )
    )


class Edges:
    """What the parameter service has of edges, asked as ranking asks it."""

    def __init__(self, system: Services) -> None:
        self._parameters = GrpcParameters(system.loaded.parameter_address, Schema.of(system.loaded).hash, 5.0)

    def places(self) -> dict[int, int]:
        """Cluster id → place."""
        _, payload = self._parameters.dense()
        arrays = safetensors.numpy.load(payload)
        return dict(zip(arrays["clusters.ids"].tolist(), arrays["clusters.places"].tolist(), strict=True))

    def of(self, place: int, item_id: str) -> list[float]:
        """d, n, b."""
        block = Block(layout="edge", slots=np.array([place], np.int32), keys=np.array([key_of(item_id)]))
        return [float(v) for v in self._parameters.lookup([block]).values[0][0]]


def logged(system: Services, request_id: str) -> Impression:
    """The impression as it lies in the log."""

    def found() -> Any:
        for record in system.records("impression"):
            impression = messages.parse_impression(record.value)
            if impression.request_id == request_id:
                return impression
        return None

    impression: Impression = wait_for(found, "the impression in the log")
    return impression


def test_the_bandit_finds_candidates_and_learns_from_what_they_bring(system: Services) -> None:
    system.call("PUT", "/v1/items", {"items": ITEMS})
    for number in range(5):
        users_click(system, number)

    def explored() -> Any:
        """An answer with three items of the bandit's, and which; the first item of any other is clicked: feedback looks alive."""
        user = f"user-{int(time.time() * 50) % 20}"
        answer = system.call("POST", "/v1/recommend", {"user_id": user, "n": 20})
        found = [item["item_id"] for item in answer["items"] if "bandit" in item["sources"]]
        if len(found) < 3:
            click = {"event_id": answer["request_id"], "user_id": user, "item_id": answer["items"][0]["item_id"]}
            system.click(click | {"request_id": answer["request_id"], "time_ms": now_ms()})
        return len(found) >= 3 and (answer, found)

    answer, found = wait_for(explored, "candidates of the bandit's", 120.0)
    impression = logged(system, answer["request_id"])
    served: Served = decode(impression.bandit, len(impression.items))
    assert served.generation == impression.generation == answer["generation"]
    assert served.weights.sum() == pytest.approx(1.0, abs=1e-5)
    shown = [item.item_id for item in impression.items]
    assert all(served.edges[shown.index(item_id)] for item_id in found), "what the bandit brought has an edge"
    third = impression.items[2]
    assert third.pool is not None and third.propensity == dict(third.pool)[third.item_id] < 1
    assert sum(p for _, p in third.pool) == pytest.approx(1.0)

    edges, took = Edges(system), []
    for item, bits in zip(shown, served.edges.tolist(), strict=True):
        if bits and len(took) < 5:
            bit = bits.bit_length() - 1
            weight, place = float(served.weights[bit]), edges.places()[int(served.clusters[bit])]
            wait_for(lambda p=place, i=item: edges.of(p, i)[1] > 0, "the edge shown", 60.0)
            before = edges.of(place, item)
            took.append(rewarded(system, impression, item, lambda p=place, i=item, b=before: edges.of(p, i)[2] > b[2]))
            assert edges.of(place, item)[2] - before[2] == pytest.approx(weight, rel=0.01), "decay of minutes aside"
    assert len(took) >= 3 and max(took) < WITHIN_S, took
    assert system.metric("recsys_bandit_clusters", "trainer") >= 1
    wait_for(lambda: system.metric("recsys_bandit_rewards_total", "trainer") >= len(took), "the rewards counted")
    swapped(system, 2)


def swapped(system: Services, times: int) -> None:
    """Ask until so many generations took over: every answer is 200, and who builds them gives way to everybody."""
    ranking, generations, nice = psutil.Process(system.processes["ranking"].pid), set[str](), dict[int, int]()

    def done() -> bool:
        generations.add(system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": 20})["generation"])
        for child in ranking.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
                nice[child.pid] = int(child.nice())
        return len(generations) > times

    wait_for(done, "the generations", 180.0)
    assert set(nice.values()) == {NICE}


def rewarded(system: Services, impression: Impression, item_id: str, arrived: Callable[[], bool]) -> float:
    """Seconds from a click on a shown item until its reward `arrived`."""
    sent = time.monotonic()
    system.click(
        {"event_id": f"of {item_id}", "user_id": impression.user_id, "item_id": item_id, "time_ms": now_ms()}
        | {"request_id": impression.request_id}
    )
    wait_for(arrived, "the reward", 10.0)
    return time.monotonic() - sent
