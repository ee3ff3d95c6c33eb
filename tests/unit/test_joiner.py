"""The joiner: each (impression, item, task) label exactly once, when its window closes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import TaskConfig, parse
from recsys.training.joiner import Joiner
from recsys.training.opened import Emission
from recsys.types import Feedback, Impression, ShownItem

NOT_WAITING = tuple(
    parse(
        {
            "tasks": [
                {"name": "click", "types": ["click"], "window_s": 20, "labels": "early_positive"},
                {"name": "like", "types": ["like"], "window_s": 30, "labels": "fnw"},
                {"name": "both", "types": ["click", "like"], "window_s": 40, "labels": "es_dfm", "wait_s": 10},
            ]
        }
    ).tasks
)
TASKS = (TaskConfig(name="click", types=("click",), window_s=10), TaskConfig(name="like", types=("like",), window_s=60))


def impression(request_id: str, items: int = 2, activation: str = "shown") -> Impression:
    shown = tuple(ShownItem(item_id=f"i{n}", position=n + 1, predictions={"click": 0.25}) for n in range(items))
    return Impression(
        request_id=request_id, user_id="u", time_ms=0, items=shown, features=request_id.encode(), activation=activation
    )


def feedback(request_id: str | None, item: str = "i0", kind: str = "click", event_id: str = "e") -> Feedback:
    return Feedback(event_id=event_id, user_id="u", item_id=item, type=kind, time_ms=0, request_id=request_id)


def test_tasks_close_with_their_windows_and_have_disjoint_masks(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path)
    assert joiner.impression(impression("r"), 1000) == "opened"
    assert joiner.feedback(feedback("r", "i1"), 2000) == "joined"
    assert joiner.feedback(feedback("r", "i0", "like"), 30_000) == "joined"
    assert list(joiner.close(11_000)) == []
    (first,) = joiner.close(11_001)
    assert (first.features, first.mask.tolist(), first.first.tolist()) == (b"r", [[True, False]] * 2, [True] * 2)
    assert first.labels[:, 0].tolist() == [False, True]
    np.testing.assert_array_equal(first.predictions[:, 0], [0.25, 0.25])
    (second,) = joiner.close(61_001)
    assert (second.mask.tolist(), second.first.tolist()) == ([[False, True]] * 2, [False] * 2)
    assert second.labels[:, 1].tolist() == [True, False]
    assert all((e.mask == e.final).all() for e in (first, second))
    assert len(joiner) == 0
    assert not joiner.emitter.due(10**9)


def test_late_early_duplicate_and_foreign_feedback_are_told_apart(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path)
    assert joiner.feedback(feedback("r"), 500) == "early"
    assert joiner.feedback(feedback("never"), 500) == "early"
    joiner.impression(impression("r"), 1000)
    assert joiner.held.take_settled() == ["joined"]
    assert joiner.impression(impression("r"), 1100) == "duplicate"
    assert joiner.feedback(feedback("r"), 1200) == "duplicate"
    assert joiner.feedback(feedback("r", "elsewhere"), 1200) == "unknown_item"
    assert joiner.feedback(feedback(None), 1200) == "no_request"
    assert joiner.feedback(feedback("r", "i1"), 11_001) == "too_late"
    (emission,) = joiner.close(11_001)
    assert emission.labels[:, 0].tolist() == [True, False]
    list(joiner.close(70_000))
    assert joiner.held.take_settled() == ["no_impression"]
    assert joiner.feedback(feedback("r"), 70_000) == "too_late"


def test_feedback_read_before_its_impression_is_judged_by_its_own_time_even_after_a_restart(tmp_path: Path) -> None:
    first, second = Joiner(TASKS, tmp_path), Joiner(TASKS, tmp_path / "again")
    assert first.feedback(feedback("r", "i0"), 11_000) == "early"
    assert first.feedback(feedback("r", "i1", event_id="f"), 11_001) == "early"
    second.restore(orjson.loads(orjson.dumps(first.state())))
    for joiner in (first, second):
        joiner.impression(impression("r"), 1000)
        assert joiner.held.take_settled() == ["joined", "too_late"]
        (emission,) = joiner.close(11_002)
        assert emission.labels[:, 0].tolist() == [True, False]


def test_impressions_out_of_time_order_keep_their_features(tmp_path: Path) -> None:
    """Partitions are not read in step: an older impression may come after a younger one, even after that one's file was dropped."""
    joiner = Joiner(TASKS, tmp_path)
    joiner.impression(impression("young"), 300_000)
    joiner.impression(impression("old"), 10_000)
    assert sorted(e.features for e in joiner.close(400_000)) == [b"old", b"old", b"young", b"young"]
    joiner.spill.sweep(())
    joiner.impression(impression("older"), 5_000)
    assert [e.features for e in joiner.close(400_000)] == [b"older"] * 2


def emitted(joiner: Joiner, now_ms: int, item: int = 0) -> list[tuple[dict[str, int], set[str], bool]]:
    """Of one item: labels to train on by task, tasks that became final, whether it is counted."""
    names = [task.name for task in joiner._tasks]
    found = []
    for emission in joiner.close(now_ms):
        trained = {n: int(emission.labels[item, t]) for t, n in enumerate(names) if emission.mask[item, t]}
        final = {n for t, n in enumerate(names) if emission.final[item, t]}
        found.append((trained, final, bool(emission.first[item])))
    return found


def single(tmp_path: Path, **policy: object) -> Joiner:
    task = {"name": "buy", "types": ["buy"], "window_s": 60, **policy}
    joiner = Joiner(parse({"tasks": [task]}).tasks, tmp_path)
    joiner.impression(impression("r"), 0)
    return joiner


def test_early_positives_are_emitted_once_and_the_rest_at_the_windows_end(tmp_path: Path) -> None:
    joiner = single(tmp_path, labels="early_positive")
    assert joiner.feedback(feedback("r", "i0", "buy"), 5000) == "joined"
    assert joiner.emitter.due(5000)
    assert emitted(joiner, 5000) == [({"buy": 1}, {"buy"}, True)]
    assert joiner.feedback(feedback("r", "i0", "buy"), 6000) == "duplicate"
    assert not joiner.emitter.due(7000)
    assert emitted(joiner, 60_001) == [({}, set(), False)]
    again = single(tmp_path / "other", labels="early_positive")
    assert again.feedback(feedback("r", "i0", "buy"), 5000) == "joined"
    list(again.close(5000))
    assert emitted(again, 60_001, item=1) == [({"buy": 0}, {"buy"}, True)]


def test_fnw_emits_negatives_at_once_and_a_positive_again(tmp_path: Path) -> None:
    joiner = single(tmp_path, labels="fnw")
    assert emitted(joiner, 1) == [({"buy": 0}, set(), True)]
    joiner.feedback(feedback("r", "i0", "buy"), 5000)
    assert emitted(joiner, 5000) == [({"buy": 1}, set(), False)]
    assert emitted(joiner, 60_001) == [({}, {"buy"}, False)]
    assert joiner.feedback(feedback("r", "i1", "buy"), 60_001) == "too_late"


def test_es_dfm_waits_shortly_repeats_late_positives_and_teaches_its_helpers_in_the_end(tmp_path: Path) -> None:
    joiner = single(tmp_path, labels="es_dfm", wait_s=10)
    joiner.feedback(feedback("r", "i0", "buy"), 9000)
    assert list(joiner.close(10_000)) == []
    soon, later = joiner, single(tmp_path / "later", labels="es_dfm", wait_s=10)
    assert emitted(soon, 10_001) == [({"buy": 1}, set(), True)]
    assert emitted(soon, 60_001) == [({"buy~late": 0}, {"buy", "buy~late", "buy~never"}, False)]
    assert emitted(later, 10_001) == [({"buy": 0}, set(), True)]
    later.feedback(feedback("r", "i0", "buy"), 20_000)
    assert emitted(later, 20_000) == [({"buy": 1}, set(), False)]
    assert emitted(later, 60_001) == [({"buy~late": 1, "buy~never": 0}, {"buy", "buy~late", "buy~never"}, False)]
    never = single(tmp_path / "never", labels="es_dfm", wait_s=10)
    assert emitted(never, 60_001)[1] == ({"buy~late": 0, "buy~never": 1}, {"buy", "buy~late", "buy~never"}, False)


def test_a_positive_that_comes_before_the_regular_emission_was_made_is_carried_by_it(tmp_path: Path) -> None:
    joiner = single(tmp_path, labels="fnw")
    joiner.feedback(feedback("r", "i0", "buy"), 5000)
    assert emitted(joiner, 5001) == [({"buy": 1}, set(), True)]


STEPS = st.lists(
    st.tuples(st.sampled_from(["impression", "click", "like", "close"]), st.integers(0, 3), st.integers(0, 40)),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(0, 39), st.sampled_from([TASKS, NOT_WAITING]))
def test_restoring_at_any_point_changes_nothing(tmp_path_factory, steps, cut, tasks) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("joiner")
    now_ms = sum(step for _, _, step in steps[:cut]) * 1000
    whole, joiner = (Joiner(tasks, folder / name) for name in "ab")
    straight, before = ([*run(one, steps[:cut], 0), *one.close(now_ms)] for one in (whole, joiner))  # as a step ends
    straight += run(whole, steps[cut:], now_ms)
    state = orjson.loads(orjson.dumps(joiner.state()))
    restored = Joiner(tasks, folder / "b")
    restored.restore(state)
    after = run(restored, steps[cut:], now_ms)
    assert [key(e) for e in straight] == [key(e) for e in before + after]
    for kind in ("mask", "final"):
        seen = [(e.request_id, *place) for e in straight for place in np.argwhere(getattr(e, kind)).tolist()]
        assert len(seen) == len(set(seen)) or (kind == "mask" and tasks is NOT_WAITING)


def run(joiner: Joiner, steps: list[tuple[str, int, int]], now_ms: int) -> list[Emission]:
    emitted: list[Emission] = []
    for kind, request, seconds in steps:
        now_ms += seconds * 1000
        if kind == "impression":
            joiner.impression(impression(f"r{request}"), now_ms)
        elif kind == "close":
            emitted += joiner.close(now_ms)
        else:
            joiner.feedback(feedback(f"r{request}", f"i{request % 2}", kind), now_ms)
    return emitted


def key(emission: Emission) -> tuple[object, ...]:
    arrays = emission.mask, emission.final, emission.labels & (emission.mask | emission.final), emission.first
    return emission.request_id, emission.features, *(array.tolist() for array in arrays)


BUDGET = 500_000
"""Bytes of memory for everything: 30 kB for open impressions, 10 kB for early feedback."""


def test_feedback_that_names_invented_requests_is_held_in_bounded_memory_the_newest_of_it(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path, BUDGET)
    for n in range(2000):
        assert joiner.feedback(feedback(f"r{n}", event_id=f"e{n}"), 1000 + n) == "early"
    settled = joiner.held.take_settled()
    assert set(settled) == {"not_held"} and 1980 < len(settled) < 2000 and len(joiner.held.take_never()) == len(settled)
    assert 0.9 < joiner.full_ratios[1] <= 1
    again = Joiner(TASKS, tmp_path / "again", BUDGET)
    again.restore(orjson.loads(orjson.dumps(joiner.state())))
    smaller = Joiner(TASKS, tmp_path / "smaller", BUDGET // 2)
    smaller.restore(joiner.state())
    given_up = smaller.held.take_settled()
    assert set(given_up) == {"not_held"} and 0 < len(given_up) == len(joiner.held) - len(smaller.held)
    for one in (joiner, again):
        one.impression(impression("r1999"), 3000)
        one.impression(impression("r0"), 3000)
        assert one.held.take_settled() == ["joined"] and [f.event_id for _, f in one.early] == []
        assert len(list(one.close(10_000_000))) == 4
        assert set(one.held.take_settled()) == {"no_impression"} and one.full_ratios == (0, 0)


def test_one_invented_request_cannot_take_more_than_all_the_room(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path, BUDGET)
    for n in range(100):
        joiner.feedback(feedback("r", event_id=f"e{n}", item=f"i{n}"), 1000)
    assert joiner.full_ratios[1] <= 1 and set(joiner.held.take_settled()) == {"not_held"}


def test_beyond_the_room_new_impressions_are_not_opened_and_what_is_open_keeps_its_labels(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path, BUDGET)
    outcomes = [joiner.impression(impression(f"r{n}"), 1000) for n in range(100)]
    opened = outcomes.count("opened")
    assert outcomes == ["opened"] * opened + ["no_room"] * (100 - opened) and 10 < opened < 30
    assert joiner.feedback(feedback("r0"), 1500) == "joined" and joiner.feedback(feedback("r99"), 1500) == "not_opened"
    again = Joiner(TASKS, tmp_path / "again", BUDGET)
    again.restore(joiner.state())
    assert again.full_ratios == joiner.full_ratios and joiner.full_ratios[0] > 0.9
    assert sum(int(e.labels.sum()) for e in joiner.close(100_000)) == 2  # of one click, in two tasks' emissions
    assert len(joiner) == 0 and joiner.impression(impression("later"), 100_001) == "opened"


def test_feedback_of_an_impression_without_features_is_not_held(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path, BUDGET)
    assert joiner.feedback(feedback("r"), 900) == "early"
    assert joiner.impression(replace(impression("r"), features=b""), 1000) == "no_features"
    assert joiner.held.take_settled() == ["not_opened"] and [at for at, _ in joiner.early] == [900]
    assert joiner.feedback(feedback("r"), 1100) == "not_opened" and joiner.full_ratios == (0, 0)


def test_a_window_of_many_minutes_keeps_few_files_open(tmp_path: Path) -> None:
    joiner = Joiner((TaskConfig(name="click", types=("click",), window_s=7200),), tmp_path)
    for minute in range(100):
        joiner.impression(impression(f"r{minute}"), 60_000 * minute)
    assert len(joiner.spill._files) <= 16
    assert [e.features for e in joiner.close(10**8)] == [f"r{minute}".encode() for minute in range(100)]


def test_held_feedback_of_older_releases_is_read(tmp_path: Path) -> None:
    old = Joiner(TASKS, tmp_path).state()
    fields = {name: getattr(feedback("r"), name) for name in Feedback.__dataclass_fields__ if name != "context"}
    old["early"] = [["r", [[500, fields]]]]
    joiner = Joiner(TASKS, tmp_path)
    joiner.restore(orjson.loads(orjson.dumps(old)))
    joiner.impression(impression("r"), 600)
    assert joiner.held.take_settled() == ["joined"]


def test_open_impressions_go_on_under_other_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Joiner(TASKS, tmp_path)  # 10 and 60 s
    for request, at_ms in (("old", 0), ("new", 40_000)):
        first.impression(impression(request), at_ms)
    assert [e.request_id for e in first.close(50_001)] == ["old", "new"]  # the clicks' windows
    state = orjson.loads(orjson.dumps(first.state()))
    longer, shorter = (
        Joiner(tuple(replace_window(task, ends) for task in TASKS), tmp_path) for ends in ({"like": 90}, {"like": 5})
    )
    for joiner in (longer, shorter):
        joiner.restore(state)
    assert [e.mask.tolist() for e in longer.close(200_000)] == [[[False, True]] * 2] * 2
    assert len(shorter) == 0 and list(shorter.close(200_000)) == [] and "2 open impressions are over" in caplog.text


def replace_window(task: TaskConfig, windows_s: dict[str, int]) -> TaskConfig:
    return task.model_copy(update={"window_s": windows_s.get(task.name, task.window_s)})
