"""Requests that outcomes are waited for: in order of opening, within a bound."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from recsys.events.open_requests import OpenRequests


@dataclass(slots=True)
class Kept:
    time_ms: int
    num_bytes: int


def test_who_refuses_asks_for_room_and_who_makes_some_closes_the_first() -> None:
    refusing, making = OpenRequests[Kept](100), OpenRequests[Kept](100)
    for number in range(5):
        if refusing.has_room(40):
            refusing.add(str(number), Kept(number, 40))
        making.add(str(number), Kept(number, 40))
        making.make_room()
    assert (list(refusing), list(making)) == (["0", "1"], ["3", "4"])
    assert refusing.full_ratio == making.full_ratio == 0.8


def test_of_a_clock_that_was_ahead_all_is_closed_in_time() -> None:
    requests = OpenRequests[Kept](100)
    requests.add("a", Kept(1000, 1))
    requests.add("b", Kept(9000, 1))
    requests.set_back(2000)
    requests.drop_before(2000)
    assert list(requests) == ["b"] and requests.get("a") is None and requests.get(None) is None
    requests.drop_before(2001)
    assert not len(requests) and requests.full_ratio == 0


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "shrink", "clear"]), st.integers(0, 3)), max_size=60))
def test_the_bytes_are_those_of_what_is_open(steps: list[tuple[str, int]]) -> None:
    requests = OpenRequests[Kept](1000)
    for number, (what, name) in enumerate(steps):
        found = requests.get(str(name))
        if what == "add":
            requests.add(str(name), Kept(number, 10))
        elif what == "drop":
            assert requests.drop(str(name)) is found
        elif what == "shrink" and found is not None:
            requests.shrink(found, 1)
        elif what == "clear":
            requests.clear()
        assert requests.full_ratio == sum(kept.num_bytes for _, kept in requests.items()) / 1000
