"""Tables much too small for what comes: learning goes on, what is seen often stays, serving has what the trainer has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from recsys.candidates.sources import Sources
from recsys.clock import SystemClock
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model.layouts import layouts
from recsys.parameters.store import ParameterStore
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.state.memory_state import MemoryState
from recsys.streams.open_log import open_log
from recsys.table.base import Rows
from recsys.table.segments import merged, read_chain
from recsys.testing.world import World
from recsys.types import Feedback
from tests.system.embedded import wait_for
from tests.system.services import Services, tasks

pytestmark = pytest.mark.system

CAPACITY = 1000
REGULARS = [f"regular-{n}" for n in range(5)]
TINY = f"table.capacity = {CAPACITY}\n{tasks(0.5, 1.0)}"


class Site:
    """Answers of an untrained ranking in the log, and clicks: every tenth to a regular, the others to users seen once."""

    def __init__(self, system: Services) -> None:
        self._config = system.loaded
        self._world, schema = World(seed=1, num_users=12, num_items=60), Schema.of(self._config)
        self._sources = Sources(self._config, schema, Catalogue(schema))
        scorer = Scorer(self._config, schema, ParameterStore(layouts(self._config, schema), schema.hash))
        self._pipeline = Pipeline(self._config, schema, MemoryState(50, 1000), self._sources, scorer, None)
        self._asked = 0
        self._clock = SystemClock()
        with self._log() as log:
            for item in self._world.items():
                self._sources.item(item)
                log.append("item", [(item.item_id, messages.dump_item(item))])

    @contextlib.contextmanager
    def _log(self) -> Iterator[object]:
        with contextlib.closing(open_log(self._config, self._clock, "test")) as log:
            yield log

    def visits(self, count: int) -> None:
        """So many answers of four items, and a click on the first of each."""
        items = [item.item_id for item in self._world.items()]
        shown, clicks = [], []
        for _ in range(count):
            self._asked += 1
            number = self._asked
            user = f"once-{number}" if number % 10 else REGULARS[number // 10 % len(REGULARS)]
            candidates = tuple(items[(number * 7 + n) % len(items)] for n in range(6))
            request = Request(request_id=f"r{number}", user_id=user, n=4, candidates=candidates)
            answer = self._pipeline.recommend(request, self._clock.now_ms())
            shown.append((user, messages.dump_impression(answer.impression)))
            click = Feedback(
                event_id=f"e{number}",
                user_id=user,
                item_id=answer.items[0].item_id,
                type="click",
                time_ms=self._clock.now_ms(),
                request_id=f"r{number}",
            )
            clicks.append((user, messages.dump_feedback(click)))
        with self._log() as log:
            log.append("impression", shown)  # type: ignore[attr-defined]
            log.append("feedback", clicks)  # type: ignore[attr-defined]


def rows_on_disk(folder: Path) -> dict[str, Rows]:
    """Every row that a stopped process left, by layout, in order of slot and key."""
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    found = {}
    for layout, part in merged(read_chain(folder, manifest["segments"])).items():
        found[layout] = part.rows.take(np.lexsort((part.rows.keys, part.rows.slots)))
    return found


def learned(system: Services, clicks: int) -> bool:
    """Whether so many clicks were learned in this life of the trainer, which must be alive."""
    for name in ("trainer", "parameter"):
        assert system.processes[name].poll() is None, system.output_of(name).read_text()[-3000:]
    return system.samples("trainer", "recsys_examples_total").get(("1", "click"), 0) >= clicks


def test_learning_goes_on_far_past_a_tables_capacity_and_over_restarts(tmp_path: Path) -> None:
    with contextlib.closing(Services(tmp_path / "tiny", TINY)) as system:
        site = Site(system)
        site.visits(600)
        for name in ("parameter", "trainer"):
            system.spawn(name)
        for name in ("parameter", "trainer"):
            system.wait_ready(name)
        wait_for(lambda: learned(system, 600), "600 clicks learned")
        evicted = wait_for(
            lambda: system.samples("trainer", "recsys_table_evicted_rows_total").get(("wide",)), "rows made room"
        )
        assert evicted > CAPACITY
        for name in ("trainer", "parameter"):
            system.kill(name)
        site.visits(600)
        for name in ("parameter", "trainer"):
            system.spawn(name)
            system.wait_ready(name)
        wait_for(lambda: learned(system, 600), "600 more learned")
        for layout in ("wide", "deep"):
            wait_for(lambda: 0.8 < full(system, layout) <= 1, f"table {layout} is full")  # noqa: B023
        assert system.metric("recsys_table_refused_keys_total", "trainer") == 0, "new keys are admitted at once"
        assert "tables have room for deep 1,000 rows" in system.output_of("trainer").read_text()
        stop(system, "trainer")
        wait_for(lambda: not system.metric("recsys_consumer_lag_records", "parameter"), "every delta is applied")
        stop(system, "parameter")
        trained, served = (rows_on_disk(system.data / name) for name in ("trainer", "parameter"))
        for layout, rows in trained.items():
            assert 0 < len(rows.keys) <= CAPACITY or layout == "edge"
            for name in ("slots", "keys", "values", "last_seen_ms"):
                np.testing.assert_array_equal(getattr(rows, name), getattr(served[layout], name), err_msg=name)
        kept = set(trained["deep"].keys.tolist())
        assert all(key_of(user) in kept for user in REGULARS), "what is seen often outlives what was seen once"
        assert sum(key_of(f"once-{number}") in kept for number in range(1, 1200)) > CAPACITY / 2, (
            "the rest of the table is theirs"
        )


def full(system: Services, layout: str) -> float:
    return system.samples("trainer", "recsys_table_full_ratio")[(layout,)]


def stop(system: Services, name: str) -> None:
    system.processes[name].terminate()
    assert system.processes[name].wait(30) == 0, system.output_of(name).read_text()[-3000:]
