"""The sources: one list of them, and what they bring against plain sums, sets and sorts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates.base import Arrays, Asked, Counted, Listing, Parts, Reason, Source
from recsys.candidates.mix import Found, Mixed, Showable, mix
from recsys.candidates.registry import class_of
from recsys.candidates.sources import Sources
from recsys.config import parse
from recsys.config.source_list import SOURCES, Listed
from recsys.errors import ConfigError
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.retrieval.filed_values import Value
from recsys.retrieval.select import among, best, looked_up, tally
from recsys.retrieval.shared_attributes import Followed
from recsys.state.memory_state import MemoryState
from recsys.testing.world import World
from recsys.types import Bool, Feedback, HistoryEvent, Int32

NUM = 30
ROWS = st.lists(st.integers(0, NUM - 1), unique=True, max_size=20)
SCORES = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0, 7.5])
MASKS = st.lists(st.booleans(), min_size=NUM, max_size=NUM).map(lambda bits: np.array(bits, np.bool_))
LEFT_OUT = ROWS.map(lambda rows: np.array(sorted(rows), np.int32))


class Evenings(Source):
    """What is chosen at all: a source that nobody knew of, in this one file."""

    name = "evenings"
    prior = 2.0

    def __init__(self, parts: Parts) -> None:
        self.rows: list[int] = []

    def candidates(self, asked: Asked, quota: int) -> Listing:
        rows = np.array(self.rows[:quota], np.int32)
        return rows, np.ones(len(rows), np.float32)

    def reason(self, asked: Asked) -> Reason:
        return Reason(99, "for the evening")

    def counted(self, event: Counted) -> None:
        self.rows.append(event.row)

    def state(self) -> dict[str, Arrays]:
        return {"evenings": {"rows": np.array(self.rows, np.int32)}}

    def restore(self, state: dict[str, Arrays], row_map: Int32, **times: int) -> None:  # type: ignore[override]
        self.rows = row_map[state["evenings"]["rows"]].tolist()


@pytest.fixture
def evenings() -> Iterator[None]:
    SOURCES["evenings"] = Listed(f"{__name__}:Evenings", 0)
    yield
    del SOURCES["evenings"]


def test_every_listed_source_is_where_the_list_says() -> None:
    assert [class_of(name).name for name in SOURCES] == list(SOURCES)


def test_unknown_source_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown source 'trend', did you mean 'trending'.*bandit, covisited, followed"
    ):
        parse({"retrieval": {"sources": {"trend": 3}}})
    with pytest.raises(ConfigError, match="unknown source 'caller'"):
        parse({"retrieval": {"sources": {"caller": 3}}})


def test_a_new_source_is_one_class_and_one_line(evenings: None, tmp_path: Path) -> None:
    """It is configured, fed, asked, named, explained, boosted, saved and restored."""
    config = parse(
        {
            "data_dir": str(tmp_path),
            "ranking": {"scorer": "sources", "exclude": "none"},
            "retrieval": {"sources": {"evenings": 5, "trending": 0}},
            "slate": {"boosts": [{"sources": ["evenings"], "times": 3.0}], "draw_positions": []},
        }
    )
    schema, items = Schema.of(config), World(0, num_users=5, num_items=20).items()
    first, second = (Sources(config, schema, Catalogue(schema)) for _ in range(2))
    for sources in (first, second):
        for item in items:
            sources.item(item)
    feedback = Feedback(event_id="e", user_id="u", item_id=items[4].item_id, type="click", time_ms=1)
    event = HistoryEvent(time_ms=1, event_id="e", item_id=items[4].item_id, type="click")
    first.events.feedback(feedback, (), event, 1)
    second.restore(first.state(), np.arange(20, dtype=np.int32), 1)
    for sources in (first, second):
        scorer = Scorer(config, schema, None)  # type: ignore[arg-type]
        pipeline = Pipeline(config, schema, MemoryState(10, 10), sources, scorer, None)
        shown = pipeline.recommend(Request(request_id="r", user_id="u", n=3), 2)
        assert shown.items[0].item_id == items[4].item_id
        assert shown.items[0].sources == ("evenings",) and shown.items[0].score == 2.0  # before boosts
        assert shown.reasons[0] == "for the evening"


def plain_mix(found: list[Found], limit: int, priors: dict[str, float], may: Showable, quotas: dict[str, int]) -> Mixed:
    """`mix` by whole-array numpy: filter, cut, unique, sum, sort."""
    allowed = []
    for name, rows, scores in found:
        kept = may.alive[rows] & may.allowed[rows] & ~np.isin(rows, may.left_out)
        allowed.append((name, rows[kept][: quotas[name]], scores[kept][: quotas[name]]))
    if not allowed:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    every, where = np.unique(np.concatenate([rows for _, rows, _ in allowed]), return_inverse=True)
    totals, masks, start = np.zeros(len(every)), np.zeros(len(every), np.int64), 0
    for bit, (name, rows, scores) in enumerate(allowed):
        places = where[start : start + len(rows)]
        start += len(rows)
        evidence = np.maximum(scores.astype(np.float64), 0.0)
        if name in priors and (mass := evidence.sum()) > 0:
            evidence *= priors[name] / mass
        totals[places] += evidence
        masks[places] |= 1 << bit
    first = np.argsort(-totals, kind="stable")[:limit]
    return every[first].astype(np.int32), totals[first].astype(np.float32), masks[first]


@st.composite
def listings(draw: st.DrawFn) -> list[Found]:
    names = draw(st.lists(st.sampled_from(["caller", "nearest", "trending", "covisited"]), unique=True))
    lists = []
    for name in names:
        rows = np.array(draw(ROWS), np.int32)
        scores = draw(st.lists(SCORES, min_size=len(rows), max_size=len(rows)))
        lists.append((name, rows, np.array(scores, np.float32)))
    return lists


@settings(max_examples=200, deadline=None)
@given(listings(), MASKS, MASKS, LEFT_OUT, st.integers(0, 25), st.integers(0, 12))
def test_mix_is_the_plain_one_bit_by_bit(
    found: list[Found], alive: Bool, allowed: Bool, left_out: Int32, limit: int, quota: int
) -> None:
    may, priors = Showable(alive, allowed, left_out), {"nearest": 3.0, "trending": 10.0}
    quotas = {name: quota + place for place, (name, _, _) in enumerate(found)}
    ours, plain = mix(found, limit, priors, may, quotas), plain_mix(found, limit, priors, may, quotas)
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, NUM + 5), max_size=40), st.none() | MASKS, st.none() | LEFT_OUT)
def test_among_is_what_the_masks_say(rows: list[int], allowed: Bool | None, left_out: Int32 | None) -> None:
    gone = set() if left_out is None else set(left_out.tolist())
    shown = [
        place
        for place, row in enumerate(rows)
        if row >= 0 and row not in gone and (allowed is None or (row < len(allowed) and allowed[row]))
    ]
    for kind in (np.int32, np.int64):
        assert among(np.array(rows, kind), allowed, left_out).tolist() == shown


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, NUM - 1), SCORES), max_size=60), st.integers(0, 30))
def test_sums_by_row_and_the_best_of_them_are_the_plain_ones(pairs: list[tuple[int, float]], k: int) -> None:
    rows, values = np.array([r for r, _ in pairs], np.int32), np.array([v for _, v in pairs], np.float64)
    found, totals = tally(rows, values)
    plain: dict[int, float] = {}
    for row, value in pairs:
        plain[row] = plain.get(row, 0.0) + value
    assert dict(zip(found.tolist(), totals.tolist(), strict=True)) == plain and list(plain) == found.tolist()
    order = sorted(plain, key=lambda row: (-plain[row], row))[:k]
    assert found[best(found, totals, k)].tolist() == order
    wanted = np.arange(NUM, dtype=np.int32)
    assert looked_up(found, totals, wanted).tolist() == [plain.get(row, 0.0) for row in wanted.tolist()]


def plain_list(followed: Followed, value: Value) -> dict[int, float]:
    """What a value's rows are worth to it: the popular ones in order, every fourth place one of the newest of the others."""
    sums = followed._popularity.sums
    popular = sorted(value.popular, key=lambda row: (-sums[row], row))
    newest = [row for row in value.newest if row not in value.popular]
    places = {row: place + place // 3 for place, row in enumerate(popular)}
    places |= {row: 4 * place + 3 for place, row in enumerate(newest)}
    return {row: 1.0 / float(np.sqrt(1.0 + place)) for row, place in places.items()}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40), st.none() | MASKS, LEFT_OUT)
def test_followed_is_the_plain_blend_bit_by_bit(seed: int, k: int, allowed: Bool | None, left_out: Int32) -> None:
    rng, followed = np.random.default_rng(seed), Followed()
    lists: dict[tuple[int, int], dict[int, float]] = {}
    for row in range(NUM):
        followed.upsert(row, [rng.integers(3, size=1).tolist(), rng.integers(5, size=2).tolist()])
    for turn in range(6):
        for row in rng.integers(NUM, size=5 + 10 * (turn % 2)).tolist():
            followed.note(row, float(rng.integers(1, 3)))
        followed.delete(int(rng.integers(NUM)))
        names = dict.fromkeys((int(a), int(key)) for a, key in rng.integers((2, 5), size=(6, 2)))
        plain: dict[int, float] = {}
        keys = [(a, key, 0.8**age) for age, (a, key) in enumerate(names)]
        for a, key, weight in keys:
            if value := followed._filed.get((a, key)):
                if value.ranked is None or value.noted * 50 > len(value.popular):
                    lists[a, key] = plain_list(followed, value)
                for row, worth in lists[a, key].items():
                    plain[row] = plain.get(row, 0.0) + weight * worth
        shown = set(np.flatnonzero(allowed).tolist() if allowed is not None else range(NUM)) - set(left_out.tolist())
        order = sorted(plain.keys() & shown, key=lambda row: (-plain[row], row))[:k]
        rows, scores = followed.query(keys, k, allowed, left_out)
        assert rows.tolist() == order
        assert scores.tolist() == [float(np.float32(plain[row])) for row in order]
