"""What is counted has its units beside it, and stays finite whatever the time: years before and after, another half-life, a wrong clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.candidates import snapshot
from recsys.candidates.limits import NEWCOMER
from recsys.candidates.sources import Sources
from recsys.candidates.state_consumer import StateConsumer
from recsys.clock import ManualClock
from recsys.config import Config, parse
from recsys.decay import ForwardDecay
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.top_counts import Trending
from recsys.state.memory_state import MemoryState
from recsys.streams.memory_log import MemoryLog
from recsys.types import Feedback, Float32, Impression, Item, ShownItem

TIMES = st.integers(-(10**15), 4 * 10**15)
ROWS = np.arange(4, dtype=np.int32)
DAY_MS = 86_400_000
NOW_MS = 20_000 * DAY_MS


@settings(max_examples=200, deadline=None)
@given(
    st.lists(TIMES, min_size=1, max_size=8),
    TIMES,
    st.sampled_from([1e-3, 0.05, 60.0, 1800.0, 1e9]),
    st.sampled_from([64, 512]),
)
@example([NOW_MS], 0, 60.0, 512)
@example([0, NOW_MS, -(10**15), 4 * 10**15], 0, 0.05, 64)
def test_sums_are_finite_and_never_above_what_was_counted_at_any_time(
    times: list[int], read_ms: int, half_life_s: float, most: int
) -> None:
    decay, total = ForwardDecay(half_life_s, most), 0.0
    trending, covisits = Trending(half_life_s), CoVisits(half_life_s)
    for count, time_ms in enumerate(times, start=1):
        if (factor := decay.rescale(time_ms)) is not None:
            total *= factor
        total += decay.weight(time_ms)
        trending.add(1, time_ms)
        covisits.add(1, [2], time_ms)
        assert 0.0 <= total * decay.decay(read_ms) <= count * (1 + 1e-9)
        if time_ms == max(times[:count]):
            assert total * decay.decay(time_ms) >= 1 - 1e-9
        for found in (
            trending.score(ROWS, read_ms),
            trending.shares(ROWS, 3, read_ms),
            covisits.score([2], ROWS, read_ms),
        ):
            assert np.isfinite(found).all() and (found >= 0).all() and (found <= count * (1 + 1e-6)).all()


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_another_half_life_keeps_a_sum_as_of_when_it_was_saved(times: list[int], old_s: float, new_s: float) -> None:
    saved = Trending(old_s)
    for time_ms in times:
        saved.add(1, time_ms)
    loaded, last = Trending(new_s), max(times)
    loaded.restore(saved.state(), saved_ms=last + 5000, latest_ms=10**10)
    before, after = (float(t.score(ROWS, last + 5000)[1]) for t in (saved, loaded))
    assert after == pytest.approx(before, rel=1e-4, abs=1e-30)
    later = float(loaded.score(ROWS, last + 5000 + int(new_s * 1000))[1])
    assert later == pytest.approx(before / 2, rel=1e-2, abs=1e-30)


def test_counts_of_a_clock_that_was_ahead_are_brought_back() -> None:
    saved, loaded = Trending(1800.0), Trending(1800.0)
    saved.add(1, NOW_MS + DAY_MS)
    loaded.restore(saved.state(), latest_ms=NOW_MS)
    loaded.add(2, NOW_MS)
    loaded.add(2, NOW_MS)
    rows, scores = loaded.top(3, NOW_MS)
    assert rows.tolist() == [2, 1] and scores.tolist() == [2.0, 1.0]


class Ranking:
    """The counters of one ranking process over a log, restored from a folder if there is something in it."""

    def __init__(self, log: MemoryLog, clock: ManualClock, config: Config, folder: Path) -> None:
        self.schema, self.clock, self.folder = Schema.of(config), clock, folder
        self.sources = Sources(config, self.schema, Catalogue(self.schema))
        for n in range(4):
            self.sources.item(Item(item_id=f"i{n}"))
        store = MemoryState(50, 1000)
        self.consumer = StateConsumer(config, log, clock, store, self.sources, lambda *_: None)
        self.restored = snapshot.load(folder, self.sources, self.consumer, self.schema, clock.now_ms())
        while self.consumer.turn():
            pass

    def save(self) -> None:
        snapshot.save(self.folder, self.sources, self.consumer, self.schema)

    def counts(self) -> tuple[Float32, Float32, Float32]:
        """Trending, co-visits after i0, and everything's counters."""
        now_ms, sources = self.clock.now_ms(), self.sources
        user = np.zeros(len(self.schema.shared_slots), np.int64), np.zeros(len(self.schema.shared_slots), np.bool_)
        columns = sources.events.counting.columns(user, ROWS)
        counters = sources.events.counting.counters.counts(columns, now_ms)[:, 0, -1, :2]
        return sources.trending.score(ROWS, now_ms), sources.covisits.score([0], ROWS, now_ms), counters


def fill(log: MemoryLog, now_ms: int) -> None:
    """Two impressions and clicks on i0, i1, i1."""
    for n, item in enumerate(("i0", "i1", "i1")):
        user = f"u{n // 2}"
        shown = Impression(
            request_id=f"r{n}", user_id=user, time_ms=now_ms, items=(ShownItem(item_id=item, position=1),)
        )
        log.append("impression", [(user, messages.dump_impression(shown))])
        feedback = Feedback(
            event_id=f"e{n}", user_id=user, item_id=item, type="click", time_ms=now_ms, request_id=f"r{n}"
        )
        log.append("feedback", [(user, messages.dump_feedback(feedback))])


HALF_LIVES = {
    "retrieval": {"trending_half_life_s": 3600.0, "covisit_half_life_s": 60.0},
    "features": {"counters": [{"of": ["item"], "half_lives_s": [120.0]}]},
}


def test_half_lives_that_changed_between_two_starts_convert_every_count(tmp_path: Path) -> None:
    clock = ManualClock(NOW_MS)
    log = MemoryLog(clock)
    before = parse({"features": {"counters": [{"of": ["item"], "half_lives_s": [86_400.0]}]}})
    fill(log, NOW_MS)
    ranking = Ranking(log, clock, before, tmp_path)
    ranking.save()
    restarted = Ranking(log, clock, parse(HALF_LIVES), tmp_path)
    assert restarted.restored
    for was, is_now in zip(ranking.counts(), restarted.counts(), strict=True):
        np.testing.assert_allclose(is_now, was, rtol=1e-5)
    clock.advance(60_000)
    for was, is_now, left in zip(ranking.counts(), restarted.counts(), (2 ** (-1 / 60), 0.5, 2**-0.5), strict=True):
        assert was.max() > 0
        np.testing.assert_allclose(is_now / was.max(), was / was.max() * left, rtol=0.05)


@pytest.mark.parametrize("change", ["transitions", "not_finite", "negative", "cut"])
def test_what_cannot_be_converted_or_is_no_count_is_counted_anew_from_the_log(change: str, tmp_path: Path) -> None:
    clock = ManualClock(NOW_MS)
    log = MemoryLog(clock)
    fill(log, NOW_MS)
    ranking = Ranking(log, clock, Config(), tmp_path)
    if change == "not_finite":
        ranking.sources.trending._sums[2] = np.inf
    if change == "negative":
        ranking.sources.events.counting.counters._table.sums[0] = -1.0
    ranking.save()
    if change == "cut":
        path = tmp_path / "counters.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": "0"}))
    config = parse({"features": {"transitions": True}}) if change == "transitions" else Config()
    restarted = Ranking(log, clock, config, tmp_path)
    assert not restarted.restored
    trending, covisits, _ = restarted.counts()
    assert trending.tolist() == pytest.approx([NEWCOMER, 1 + NEWCOMER, 0.0, 0.0]) and covisits.tolist() == [
        0.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"catalogue": {"attributes": [*Config().catalogue.attributes, "brand"]}},
        {"features": {"context": ["device"], "counters": [{"of": ["item"]}, {"of": ["category"]}, {"of": ["user"]}]}},
        {"tasks": [{"name": "buy", "types": ["buy"]}, {"name": "click", "types": ["click"]}]},
    ],
)
def test_another_list_of_features_or_tasks_keeps_the_counts_beside_it(change: dict[str, Any], tmp_path: Path) -> None:
    clock = ManualClock(NOW_MS)
    log = MemoryLog(clock)
    fill(log, NOW_MS)
    ranking = Ranking(log, clock, Config(), tmp_path)
    ranking.save()
    restarted = Ranking(MemoryLog(clock), clock, parse(change), tmp_path)
    assert restarted.restored
    np.testing.assert_allclose(restarted.counts()[0], ranking.counts()[0])
