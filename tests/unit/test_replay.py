"""Replay: what scoring may know, and when."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.config import Config, SlateConfig, parse
from recsys.errors import BadInput
from recsys.evaluation.impression_log import ImpressionLog
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Event, Options
from recsys.types import Feedback, Impression, Item, ShownItem

SECOND = 1000


def counting() -> Config:
    return parse(
        {
            "catalogue": {"attributes": [], "multivalued": []},
            "features": {"history_types": ["click"], "history_attributes": [], "crosses": []},
            "training": {"two_tower": False},
            "retrieval": {"count_types": ["click"], "sources": {"trending": 50}},
            "ranking": {"scorer": "sources", "exclude": "session"},
        }
    )


def click(user: str, item: str, second: float, session: str = "s") -> Event:
    time_ms = int(second * SECOND)
    return (
        time_ms,
        "feedback",
        Feedback(
            event_id=f"{user}-{item}-{time_ms}",
            user_id=user,
            item_id=item,
            type="click",
            time_ms=time_ms,
            session_id=f"{user}-{session}",
        ),
    )


def catalogue(*names: str) -> list[Event]:
    """These items and forty newer ones, of which the newest fill up a list that would be short."""
    return [(0, "item", Item(item_id=name)) for name in (*names, *(f"newer-{n}" for n in range(40)))]


def hits(events: Sequence[Event], folder: Path, **options: Any) -> tuple[int, float]:
    """Answers made, and in how many the next click was shown."""
    report = Replay(counting(), Options(**options), folder).run(events)["next_item"]
    return report["predictions"], (report["hit_rate_at_20"] or 0.0) * report["predictions"]


def story(second: float) -> list[Event]:
    """Somebody clicks x at 0 s; u opens a session at 1 s and clicks x at `second`."""
    return [*catalogue("x", "y"), click("other", "x", 0), click("u", "y", 1), click("u", "x", second)]


def test_a_sessions_first_click_is_no_prediction_and_the_next_sees_all_before(tmp_path: Path) -> None:
    assert hits(story(2), tmp_path) == (1, 1)


@pytest.mark.parametrize(("second", "delay", "hit"), [(9.9, 10, 0), (10, 10, 1), (30, 60, 0), (61, 60, 1)])
def test_delay_hides_others_clicks_for_exactly_so_long(second: float, delay: float, hit: int, tmp_path: Path) -> None:
    assert hits(story(second), tmp_path, delay_s=delay) == (1, hit)


@pytest.mark.parametrize(("second", "hit"), [(99, 0), (100, 1), (150, 1)])
def test_sync_interval_shows_what_was_known_at_the_last_multiple(second: float, hit: int, tmp_path: Path) -> None:
    events = [
        *catalogue("x", "y", "z"),
        click("first", "z", 0),
        click("other", "x", 50),
        click("u", "y", 60),
        click("u", "x", second),
    ]
    assert hits(events, tmp_path, sync_interval_s=100) == (1, hit)


def test_own_history_is_live_under_delay_and_frozen_on_demand(tmp_path: Path) -> None:
    """u's second click on x is not a hit while u's session is known, since what was clicked is not shown again."""
    events = [
        *catalogue("x", "y"),
        click("a", "x", 0),
        click("u", "y", 200),
        click("u", "x", 201),
        click("u", "x", 202),
    ]
    assert hits(events, tmp_path, delay_s=100) == (2, 1)
    frozen = Replay(counting(), Options(delay_s=100, freeze_user=True), tmp_path)
    frozen.run(events)
    assert frozen.loop.store.get("u").history == ()


def test_report_from_answers_only_from_then_on(tmp_path: Path) -> None:
    assert hits([*story(2), click("u", "y", 3)], tmp_path, report_from_ms=3 * SECOND)[0] == 1


def test_sample_keeps_whole_sessions_and_about_its_share(tmp_path: Path) -> None:
    """Of 2,000 sessions of two clicks, 30% are answered: outside 540 … 660 happens less than once in 10,000 hashes."""
    events = [*catalogue("x", "y"), *(click(f"u{n // 2}", "xy"[n % 2], n) for n in range(4000))]
    answered, _ = hits(events, tmp_path, sample=0.3)
    assert 540 < answered < 660
    assert hits(events, tmp_path / "again", sample=0.3)[0] == answered


def learning() -> Config:
    return parse(
        {
            "tasks": [{"name": "click", "types": ["click"], "window_s": 0}],
            "model": {
                "dim": 4,
                "expert_hidden": [8, 4],
                "attention": [8],
                "row_learning_rate": 0.3,
                "wide_learning_rate": 0.3,
            },
            "training": {"batch_size": 4, "two_tower": False},
            "retrieval": {"sources": {"trending": 10}},
        }
    )


def impressions(labels: Sequence[bool], step_s: float = 1.0) -> list[Event]:
    """One item a request, five users and items in turn; a click at the same instant where the label says so."""
    events: list[Event] = [(0, "item", Item(item_id=f"i{n}", attributes={"category": f"c{n % 2}"})) for n in range(5)]
    for number, label in enumerate(labels):
        time_ms, user, item = int(number * step_s * SECOND), f"u{number % 5}", f"i{number % 3}"
        shown = (ShownItem(item_id=item, position=1),)
        events.append(
            (time_ms, "impression", Impression(request_id=f"r{number}", user_id=user, time_ms=time_ms, items=shown))
        )
        if label:
            feedback = Feedback(
                event_id=f"e{number}",
                user_id=user,
                item_id=item,
                type="click",
                time_ms=time_ms,
                request_id=f"r{number}",
            )
            events.append((time_ms, "feedback", feedback))
    return events


def predictions(labels: Sequence[bool], folder: Path, **options: Any) -> list[float]:
    replay = Replay(learning(), Options(click_log=False, **options), folder)
    result = replay.run(impressions(labels))
    assert result["tasks"]["click"]["examples"] == len(labels)
    assert isinstance(replay.driver, ImpressionLog)
    assert not replay.driver.num_open  # nothing is kept of what was reported
    scored: list[float] = replay.driver.progressive.rows("click")["prediction"].tolist()
    return scored


def test_a_prediction_does_not_depend_on_its_own_label_nor_on_later_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(40) < 0.4).tolist()
    flipped = [*labels[:20], *(not label for label in labels[20:])]
    first, second = predictions(labels, tmp_path / "a"), predictions(flipped, tmp_path / "b")
    assert first[:21] == second[:21]
    assert first[24:] != second[24:]


def test_until_ends_before_that_time(tmp_path: Path) -> None:
    replay = Replay(learning(), Options(click_log=False, until_ms=7 * SECOND), tmp_path)
    assert replay.run(impressions([True] * 10))["tasks"]["click"]["examples"] == 7


def test_replaying_twice_gives_the_same_predictions(tmp_path: Path) -> None:
    labels = [n % 3 == 0 for n in range(30)]
    assert predictions(labels, tmp_path / "a") == predictions(labels, tmp_path / "b")


def test_parameters_stand_still_between_synchronisations(tmp_path: Path) -> None:
    """With everything frozen for 20 s, equal requests within one interval get equal scores, and the next interval others."""
    scores = predictions([True] * 60, tmp_path, sync_interval_s=20, freeze_user=True)
    per_interval = [[scores[n] for n in range(start, start + 20) if n % 15 == start % 15] for start in (0, 20, 40)]
    for equal in per_interval:
        assert len(set(equal)) == 1
    assert per_interval[1][0] > per_interval[0][0]


def test_feedback_before_the_first_impression_of_a_stream_with_impressions_is_not_answered(tmp_path: Path) -> None:
    events = impressions([True, False])
    early = [click("u0", "i0", 0, "old"), click("u0", "i1", 0, "old")]
    replay = Replay(learning(), Options(click_log=False), tmp_path)
    result = replay.run([*events[:5], *early, *events[5:]])
    assert "next_item" not in result and result["tasks"]["click"]["examples"] == 2


def test_an_impression_of_an_unknown_item_is_counted_but_not_scored(tmp_path: Path) -> None:
    events = impressions([True] * 4)
    time_ms, kind, message = events[-2]
    assert isinstance(message, Impression)
    events[-2] = time_ms, kind, replace(message, items=(ShownItem(item_id="nowhere", position=1),))
    result = Replay(learning(), Options(click_log=False), tmp_path).run(events)
    assert result["tasks"]["click"]["examples"] == 3


def test_an_impression_in_a_click_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'r0' among the events of a click log"):
        Replay(learning(), Options(), tmp_path).run(impressions([True]))


def test_the_pools_of_a_click_log_have_their_labels_at_once_whatever_the_window(tmp_path: Path) -> None:
    def learned(window_s: float, **options: Any) -> list[float]:
        raw = learning().model_dump(mode="json")
        raw["tasks"] = [task | {"window_s": window_s} for task in raw["tasks"]]
        replay = Replay(parse(raw), Options(**options), tmp_path / f"{window_s}-{len(options)}")
        for event in [*catalogue("x", "y", "z"), *(click(f"u{n // 3}", "xyz"[n % 3], n) for n in range(60))]:
            replay.step(*event)  # the end, which makes all labels final, does not come
        assert replay.loop.trainer is not None
        return [p.detach().abs().sum().item() for p in replay.loop.trainer.learner.model.parameters()]

    assert learned(60) == learned(0) != learned(60, label_delay_s=1000)


def test_nearest_brings_items_where_sources_alone_rank(tmp_path: Path) -> None:
    """Towers learn from feedback, but are used once a step has copied them."""
    raw = counting().model_dump(mode="json")
    raw["training"] |= {"two_tower": True, "batch_size": 4}
    raw["retrieval"]["sources"] = {"nearest": 3}
    replay = Replay(parse(raw), Options(), tmp_path)
    replay.run([*catalogue("x", "y", "z"), *(click(f"u{n // 3}", "xyz"[n % 3], n) for n in range(60))])
    assert replay.loop.copy.generations.num_items == 43


@pytest.mark.parametrize(("rule", "hit"), [({}, 2), ({"seen_last": 30}, 1), ({"seen_s": 1.5}, 2), ({"seen_s": 3}, 1)])
def test_what_a_replay_has_shown_is_seen(rule: dict[str, Any], hit: int, tmp_path: Path) -> None:
    """x is shown before the click at 2 s, and again before that at 4 s unless the rule forbids it."""
    config = counting().model_copy(update={"slate": SlateConfig(draw_positions=(), **rule)})
    config = config.model_copy(update={"ranking": config.ranking.model_copy(update={"exclude": "none"})})
    events = [*story(2), click("u", "x", 4)]
    report = Replay(config, Options(), tmp_path).run(events)["next_item"]
    assert (report["predictions"], round(report["hit_rate_at_20"] * 2)) == (2, hit)
