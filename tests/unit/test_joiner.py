"""The joiner: each (impression, item, task) label exactly once, when its window closes."""

from pathlib import Path

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import TaskConfig
from recsys.training.joiner import Emission, Joiner
from recsys.types import Feedback, Impression, ShownItem

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
    assert (first.features, first.mask.tolist(), first.first) == (b"r", [True, False], True)
    assert first.labels[:, 0].tolist() == [False, True]
    np.testing.assert_array_equal(first.predictions[:, 0], [0.25, 0.25])
    (second,) = joiner.close(61_001)
    assert (second.mask.tolist(), second.first, second.labels[:, 1].tolist()) == ([False, True], False, [True, False])
    assert len(joiner) == 0
    assert not joiner.due(10**9)


def test_late_early_duplicate_and_foreign_feedback_are_told_apart(tmp_path: Path) -> None:
    joiner = Joiner(TASKS, tmp_path)
    assert joiner.feedback(feedback("r"), 500) == "early"
    assert joiner.feedback(feedback("never"), 500) == "early"
    joiner.impression(impression("r"), 1000)
    assert joiner.take_settled() == ["joined"]
    assert joiner.impression(impression("r"), 1100) == "duplicate"
    assert joiner.feedback(feedback("r"), 1200) == "duplicate"
    assert joiner.feedback(feedback("r", "elsewhere"), 1200) == "unknown_item"
    assert joiner.feedback(feedback(None), 1200) == "no_request"
    assert joiner.feedback(feedback("r", "i1"), 11_001) == "too_late"
    (emission,) = joiner.close(11_001)
    assert emission.labels[:, 0].tolist() == [True, False]
    list(joiner.close(70_000))
    assert joiner.take_settled() == ["no_impression"]
    assert joiner.feedback(feedback("r"), 70_000) == "too_late"


def test_impressions_out_of_time_order_keep_their_features(tmp_path: Path) -> None:
    """Partitions are not read in step: an older impression may come after a younger one, even after that one's file was dropped."""
    joiner = Joiner(TASKS, tmp_path)
    joiner.impression(impression("young"), 300_000)
    joiner.impression(impression("old"), 10_000)
    assert sorted(e.features for e in joiner.close(400_000)) == [b"old", b"old", b"young", b"young"]
    for path in joiner.take_dropped():
        path.unlink()
    joiner.impression(impression("older"), 5_000)
    assert [e.features for e in joiner.close(400_000)] == [b"older"] * 2


STEPS = st.lists(
    st.tuples(st.sampled_from(["impression", "click", "like", "close"]), st.integers(0, 3), st.integers(0, 40)),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(0, 39))
def test_restoring_at_any_point_changes_nothing(tmp_path_factory, steps, cut) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("joiner")
    straight = run(Joiner(TASKS, folder / "a"), steps, 0)
    joiner = Joiner(TASKS, folder / "b")
    before = run(joiner, steps[:cut], 0)
    state = orjson.loads(orjson.dumps(joiner.state()))
    restored = Joiner(TASKS, folder / "b")
    restored.restore(state)
    after = run(restored, steps[cut:], sum(step for _, _, step in steps[:cut]) * 1000)
    assert [key(e) for e in straight] == [key(e) for e in before + after]
    seen = [(e.request_id, task) for e in straight for task in np.flatnonzero(e.mask)]
    assert len(seen) == len(set(seen))


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
    return emission.request_id, emission.features, emission.mask.tolist(), emission.labels.tolist(), emission.first
