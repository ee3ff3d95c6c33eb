"""Ids of late: exact within the horizon, bounded, and what became of what is older is said."""

from __future__ import annotations

import numpy as np

from recsys.events.recent import HORIZON_MS, Recent
from recsys.events.seen_ids import PUT_S, Kind, SeenIds

MINUTE_MS = 60_000


def test_a_copy_is_known_for_the_whole_horizon_and_what_is_older_is_too_late() -> None:
    for start_ms in range(0, HORIZON_MS, 7 * MINUTE_MS):
        recent = Recent()
        assert recent.add("a", start_ms)
        for later_ms in range(start_ms, start_ms + HORIZON_MS + 1, MINUTE_MS):
            recent.add(f"other {later_ms}", later_ms)
            assert recent.contains("a") and not recent.add("a", later_ms)
            assert recent.covers(start_ms, later_ms)
        assert not recent.covers(start_ms, start_ms + HORIZON_MS + 1)


def test_of_too_many_the_oldest_are_forgotten_and_the_horizon_begins_after_them() -> None:
    recent = Recent(limit=700)
    for number in range(5000):
        assert recent.add(str(number), number)
        assert len(recent) <= 700
    assert 0.8 < recent.full_ratio <= 1
    known = [number for number in range(5000) if recent.contains(str(number))]
    assert known == list(range(known[0], 5000)) and len(known) >= 500
    assert recent.covers(known[0], 5000) and not recent.covers(known[0] - 1, 5000)


def test_time_that_goes_back_forgets_nothing_early() -> None:
    recent = Recent()
    recent.add("ahead", 2 * HORIZON_MS)
    recent.add("behind", 0)  # another partition, which is read later
    recent.add("next", 2 * HORIZON_MS + 15 * MINUTE_MS)
    assert recent.contains("behind") and recent.contains("ahead")


def test_of_a_clock_that_was_ahead_and_too_many_ids_nothing_is_too_late_for_longer() -> None:
    seen = SeenIds(memory_bytes=1)
    for number in range(5000):
        seen.first(Kind.EVENT, str(number), 24 * HORIZON_MS + number)
    assert seen.too_late(Kind.EVENT, 2001, 2001), "the horizon begins tomorrow"
    seen.set_back(2000)
    assert seen.knows(Kind.EVENT, "4999") and seen.too_late(Kind.EVENT, 1999, 2001), "of what is forgotten nobody knows"
    assert not seen.too_late(Kind.EVENT, 2000, 2001)
    seen.first(Kind.EVENT, "later", 2000 + 2 * HORIZON_MS)
    assert not seen.knows(Kind.EVENT, "4999"), "ids are forgotten by the time that is"


def test_one_store_keeps_each_kind_apart_and_says_what_is_too_late() -> None:
    seen, again = SeenIds(), SeenIds()
    for kind in Kind:
        assert seen.first(kind, "same", 0) and not seen.first(kind, "same", 0)
    assert seen.too_late(Kind.EVENT, 0, HORIZON_MS + 1) and not seen.too_late(Kind.EVENT, 0, HORIZON_MS)
    seen.first(Kind.PUT, "other", int(2000 * PUT_S))
    assert not seen.knows(Kind.PUT, "same") and seen.knows(Kind.EVENT, "same"), "an item is waited for a minute"
    again.restore(Kind.REQUEST, seen.state(Kind.REQUEST))
    assert again.knows(Kind.REQUEST, "same") and not again.knows(Kind.EVENT, "same")
    seen.clear(Kind.EVENT)
    assert seen.first(Kind.EVENT, "same", 0) and not seen.first(Kind.REQUEST, "same", 0)


def test_of_one_kind_with_too_many_ids_the_horizon_begins_later_and_no_others() -> None:
    seen = SeenIds(memory_bytes=1)  # a thousand of each: no bound is less
    for number in range(5000):
        seen.first(Kind.EVENT, str(number), number)
    assert seen.too_late(Kind.EVENT, 1000, 5000) and not seen.too_late(Kind.REQUEST, 1000, 5000)
    assert 0.5 < seen.full_ratio <= 1


def test_state_comes_back_also_of_an_earlier_version() -> None:
    recent, again, old = Recent(limit=700), Recent(limit=700), Recent()
    for number in range(1000):
        recent.add(str(number), number)
    state = recent.state()
    again.restore(state)
    assert len(again) == len(recent) and again.contains("999") and not again.contains("0")
    assert [again.covers(t, 1000) for t in range(1000)] == [recent.covers(t, 1000) for t in range(1000)]
    old.restore({name: state[name] for name in ("generation", "digest")})
    assert old.contains("999") and old.covers(0, 1000)
    empty = Recent()
    empty.restore(Recent().state())
    assert len(empty) == 0 and empty.state()["digest"].dtype == np.int64
