"""Two configurations over the same events: exactly equal ones differ by nothing, a worse one is found worse, pairs are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.evaluation.compare import place, team_draft
from recsys.evaluation.measures import differences
from recsys.events.event_files import write_events
from recsys.types import Feedback, Impression, Item, ShownItem
from services.cli.main import main

Run = Callable[..., tuple[int, dict[str, Any], str]]

COUNTING = """
[catalogue]
attributes = []
multivalued = []
[features]
history_attributes = []
crosses = []
[training]
two_tower = false
[retrieval]
count_types = ["click"]
sources = { trending = 40 }
[ranking]
scorer = "sources"
exclude = "none"
[slate]
draw_positions = []
"""
AT_RANDOM = COUNTING.replace("draw_positions = []", 'draw_positions = "all"\ndraw_kind = "epsilon"\ndraw_epsilon = 1.0')
AT_RANDOM = AT_RANDOM + "draw_pool = 40\n"
LEARNING = """
[[tasks]]
name = "click"
types = ["click"]
window_s = 0
[model]
dim = 4
expert_hidden = [8, 4]
attention = [8]
[training]
batch_size = 32
two_tower = false
[retrieval]
sources = { trending = 10 }
"""
FORGETFUL = LEARNING.replace(
    "[training]", "row_learning_rate = 1e-6\nwide_learning_rate = 1e-6\ndense_learning_rate = 1e-6\n[training]"
)
FORGETFUL = FORGETFUL.replace(
    "[model]", "[features]\ncounters = []\n[model]\npopularity_prior = 0.0\naffinity_prior = 0.0"
)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Compares two configurations (TOML texts) over the events in a folder: exit code, JSON, standard error."""

    def go(first: str, second: str, *options: str) -> tuple[int, dict[str, Any], str]:
        for name, text in (("a.toml", first), ("b.toml", second)):
            (tmp_path / name).write_text(text)
        words = ["evaluate", "compare", str(tmp_path / "a.toml"), str(tmp_path / "b.toml")]
        code = main([*words, "--events", str(tmp_path / "events"), "--json", *options])
        out = capsys.readouterr()
        return code, json.loads(out.out), out.err

    return go


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    """Eighty sessions of five clicks on sixty items, of which few are popular."""
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, 61) ** 1.3
    feedback = []
    for second in range(400):
        item, session = int(rng.choice(60, p=chances / chances.sum())), second // 5
        one = Feedback(
            event_id=f"e{second}",
            user_id=f"u{session % 40}",
            item_id=f"i{item}",
            type="click",
            time_ms=second * 1000,
            session_id=f"s{session}",
        )
        feedback.append(one)
    write_events(tmp_path / "events", [Item(item_id=f"i{n}") for n in range(60)], [], feedback)
    return tmp_path / "events"


@pytest.fixture
def impressions(tmp_path: Path) -> Path:
    """A thousand answers of two items to forty users; each of ten items has its own click rate."""
    rng = np.random.default_rng(1)
    shown, feedback = [], []
    for number in range(1000):
        user, time_ms = f"u{number % 40}", number * 1000
        pair = rng.choice(10, 2, replace=False).tolist()
        items = tuple(ShownItem(item_id=f"i{item}", position=at) for at, item in enumerate(pair, start=1))
        shown.append(Impression(request_id=f"r{number}", user_id=user, time_ms=time_ms, items=items))
        for item in pair:
            if rng.random() < 0.05 + 0.08 * item:
                event = Feedback(
                    event_id=f"e{number}-{item}",
                    user_id=user,
                    item_id=f"i{item}",
                    type="click",
                    time_ms=time_ms,
                    request_id=f"r{number}",
                )
                feedback.append(event)
    catalogue = [Item(item_id=f"i{n}", attributes={"category": f"c{n % 3}"}) for n in range(10)]
    write_events(tmp_path / "events", catalogue, shown, feedback)
    return tmp_path / "events"


@pytest.mark.usefixtures("clicks")
def test_equal_configurations_differ_by_exactly_nothing_on_clicks(run: Run) -> None:
    code, result, _ = run(AT_RANDOM, AT_RANDOM)
    assert (code, result["verdict"], result["unpaired"]) == (0, "undecided", 0)
    assert result["paired"]["predictions"] == 320
    for metric in ("hit_rate_at_20", "mrr_at_20", "interleaved"):
        found = result["paired"][metric]
        assert found["a"] == found["b"]
        assert (found["difference"], found["difference_ci"]) == (0.0, [0.0, 0.0])
    assert result["a"]["next_item"] == result["b"]["next_item"]


@pytest.mark.usefixtures("clicks")
def test_answers_at_random_are_found_worse_on_clicks(run: Run) -> None:
    code, result, _ = run(COUNTING, AT_RANDOM, "--expect", "not_worse")
    assert (code, result["verdict"], result["metric"], result["met"]) == (1, "worse", "hit_rate_at_20", False)
    for metric in ("hit_rate_at_20", "mrr_at_20", "interleaved"):
        found = result["paired"][metric]
        assert found["difference_ci"][0] <= found["difference"] <= found["difference_ci"][1] < 0
        assert found["difference"] == pytest.approx(found["b"] - found["a"])
    for name in "ab":
        alone = result[name]["next_item"]
        assert result["paired"]["hit_rate_at_20"][name] == pytest.approx(alone["hit_rate_at_20"])
        assert result["paired"]["mrr_at_20"][name] == pytest.approx(alone["mrr_at_20"])
    code, turned, _ = run(AT_RANDOM, COUNTING, "--expect", "better", "--metric", "interleaved")
    assert (code, turned["verdict"]) == (0, "better")


@pytest.mark.usefixtures("impressions")
def test_equal_configurations_differ_by_exactly_nothing_on_impressions(run: Run) -> None:
    code, result, _ = run(LEARNING, LEARNING)
    assert (code, result["unpaired"]) == (0, 0)
    found = result["paired"]["tasks"]["click"]
    assert (found["examples"], found["users"]) == (2000, 40)
    for metric in ("auc", "normalized_entropy", "gauc", "calibration"):
        assert found[metric]["a"] == result["a"]["tasks"]["click"][metric]
        assert (found[metric]["difference"], found[metric]["difference_ci"]) == (0.0, [0.0, 0.0])


@pytest.mark.usefixtures("impressions")
def test_a_model_that_hardly_learns_is_found_worse_on_impressions(run: Run) -> None:
    """The second learns in other steps, so that its labels come in another order."""
    code, result, _ = run(LEARNING, FORGETFUL.replace("batch_size = 32", "batch_size = 20"), "--expect", "better")
    assert (code, result["metric"], result["verdict"], result["unpaired"]) == (1, "click.auc", "worse", 0)
    found = result["paired"]["tasks"]["click"]
    for name in "ab":
        for metric in ("auc", "normalized_entropy", "gauc", "calibration"):
            assert found[metric][name] == pytest.approx(result[name]["tasks"]["click"][metric])
    assert found["auc"]["difference_ci"][1] < 0 < found["normalized_entropy"]["difference_ci"][0]
    assert run(LEARNING, FORGETFUL, "--metric", "click.normalized_entropy")[1]["verdict"] == "worse"


@pytest.mark.usefixtures("impressions")
@pytest.mark.parametrize(
    ("second", "options", "says"),
    [
        (LEARNING.replace('types = ["click"]', 'types = ["like"]'), (), "b.toml: tasks.click.types names 'like'"),
        (LEARNING.replace('types = ["click"]', 'types = ["click", "like"]'), (), "types of 'click'"),
        (LEARNING.replace("window_s = 0", "window_s = 60"), (), "--label-delay"),
        (LEARNING.replace('name = "click"', 'name = "like"'), (), "share none"),
        (LEARNING, ("--metric", "click.ausc"), "did you mean 'click.auc'"),
        (LEARNING, ("--sample", "2"), "--sample 2.0"),
        (LEARNING, ("--sync-interval", "1e-9"), "--sync-interval 1e-09 must be 0, or 0.001 seconds"),
        (LEARNING + "[slates]\n", (), "slates is not a known key"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(run: Run, second: str, options: tuple[str, ...], says: str) -> None:
    code, result, err = run(LEARNING, second, *options)
    assert code == 2
    assert says in result["why"]
    assert says in err


@pytest.mark.usefixtures("clicks")
@pytest.mark.parametrize(
    "options",
    [
        ("--report-from", "2100-01-01"),
        ("--until", "1960-01-01"),
        ("--sample", "1e-9", "--expect", "not_worse"),
    ],
)
def test_nothing_to_compare_is_bad_input(run: Run, options: tuple[str, ...]) -> None:
    code, result, _ = run(COUNTING, COUNTING, *options)
    assert code == 2 and result["why"].startswith("no prediction to compare: name item files, an earlier --report-from")


def test_events_without_items_are_refused_at_once(run: Run, clicks: Path) -> None:
    (clicks / "items.parquet").unlink()
    code, result, _ = run(COUNTING, COUNTING, "--expect", "not_worse")
    assert code == 2 and result["why"] == "no prediction to compare: no event file has items: name one that has"


def test_what_has_no_interval_is_not_shown_to_be_no_worse(run: Run, tmp_path: Path) -> None:
    """One user tells nothing of others; without a click, AUC is not defined."""
    pair = tuple(ShownItem(item_id=f"i{n}", position=n) for n in (1, 2))
    for users, request_id in ((1, "r9"), (5, "another")):
        click = Feedback(event_id="e", user_id="u", item_id="i1", type="click", time_ms=9000, request_id=request_id)
        shown = [
            Impression(request_id=f"r{n}", user_id=f"u{n % users}", time_ms=n * 1000, items=pair) for n in range(20)
        ]
        write_events(tmp_path / "events", [Item(item_id=f"i{n}") for n in (1, 2)], shown, [click])
        code, result, _ = run(LEARNING, LEARNING, "--expect", "not_worse")
        assert (code, result["verdict"], result["met"]) == (1, "unknown", False)


def test_a_configuration_that_is_not_there_is_named(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "none.toml")
    assert main(["evaluate", "compare", path, path, "--events", str(clicks)]) == 2
    assert f"configuration file {path!r} does not exist: check its name" in capsys.readouterr().err


def test_a_text_for_people_names_both(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(COUNTING)
    path = str(tmp_path / "a.toml")
    assert main(["evaluate", "compare", path, path, "--events", str(clicks), "--sample", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "hit_rate_at_20" in text
    assert "by hit_rate_at_20, b is undecided" in text


lists = st.lists(st.integers(0, 9), unique=True, max_size=8)


@settings(deadline=None)
@given(lists, lists, st.integers(0, 9), st.integers(1, 6))
def test_team_draft_is_fair(first: list[int], second: list[int], clicked: int, n: int) -> None:
    """Over all coins; turning lists and coins round turns the winner round; only what is shown can win."""
    a, b = [list(map(str, one)) for one in (first, second)]
    for flips in product((False, True), repeat=n):
        coins = np.array(flips)
        won = team_draft(a, b, str(clicked), coins)
        assert won == -team_draft(b, a, str(clicked), ~coins)
        if won:
            assert str(clicked) in (a, b)[won > 0]
        assert not won or place(a, str(clicked), n) or place(b, str(clicked), n)
    if first == second:
        assert sum(team_draft(a, b, str(clicked), np.array(f)) for f in product((False, True), repeat=n)) == 0


def test_differences_refuses_rows_of_other_examples() -> None:
    rows = np.zeros(2, [("prediction", "f8"), ("label", "?"), ("user", "i8"), ("day", "i4")])
    other = rows.copy()
    other["label"][0] = True
    with pytest.raises(ValueError, match="labels or users differ"):
        differences(rows, other)
