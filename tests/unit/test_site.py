"""The generated site: the same for every system, as many users and items at all times, reactions inside of the label windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recsys.config import Config
from recsys.testing.site import DAY_MS, HOUR_MS, Site, Traffic, Visit

SMALL = replace(Traffic(), active=500, users=5000, new_items=200, visits=400, events=1000)


def test_an_hour_is_the_same_whatever_was_asked_before() -> None:
    one, other = Site(SMALL, 5, seed=3), Site(SMALL, 5, seed=3)
    other.hour(7)
    assert one.hour(50) == other.hour(50)
    assert one.hour(50) != one.hour(51)


def test_items_and_users_come_and_go_and_stay_as_many() -> None:
    site = Site(SMALL, 12, seed=1)
    hours = [site.hour(n) for n in range(12 * 24)]
    alive = {item.item_id for item in site.first_items()}
    assert 0.9 * 800 < len(alive) < 1.1 * 800
    for number, hour in enumerate(hours):
        assert [at for at, _ in hour.arrivals] == sorted(at for at, _ in hour.arrivals)
        fresh = {item.item_id for _, item in hour.arrivals}
        assert not fresh & alive
        alive |= fresh
        shown = {event["item_id"] for event in hour.events}
        assert shown <= alive, "an item that is acted upon is there"
        assert all(number * HOUR_MS <= event["time_ms"] < (number + 1) * HOUR_MS for event in hour.events)
        alive -= {item for _, item in hour.departures}
    assert 0.9 * 800 < len(alive) < 1.1 * 800
    first, last = ({v.user for hour in part for v in hour.visits} for part in (hours[:48], hours[-48:]))
    assert len(first & last) < 0.3 * len(first)


def test_a_shelf_has_twenty_items_that_are_there() -> None:
    site = Site(SMALL, 2, seed=2)
    shelves = [visit.shelf for n in range(20, 30) for visit in site.hour(n).visits if visit.shelf is not None]
    assert shelves and all(len(set(shelf)) == len(shelf) for shelf in shelves)
    assert np.mean([len(shelf) for shelf in shelves]) > 19


def test_reactions_follow_the_true_probability_and_come_inside_of_the_windows() -> None:
    site = Site(SMALL, 1, seed=4)
    items = [item.item_id for item in site.first_items()][:20]
    visits = [Visit(number=n, at_ms=n, user=n, user_id=f"user-{n}", shelf=None) for n in range(3000)]
    found = [site.reactions(visit, f"r{visit.number}", items) for visit in visits]
    wanted = np.mean([site.probability(visit.user, items) for visit in visits])
    assert abs(np.mean([clicked for clicked, _ in found]) - wanted) < 0.01
    window_ms = {kind: task.window_s * 1000 for task in Config().tasks for kind in task.types}
    for visit, (clicked, events) in zip(visits, found, strict=True):
        assert sum(event["type"] == "click" for event in events) == clicked.sum()
        assert all(0 < event["time_ms"] - visit.at_ms < window_ms[event["type"]] for event in events)
    again = site.reactions(visits[0], "r0", items[::-1])[0]
    assert (again[::-1] == found[0][0]).all(), "what else was shown changes nothing"
    assert DAY_MS == 24 * HOUR_MS
