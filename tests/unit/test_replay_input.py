"""`recsys replay` refuses what cannot be right before it spends an hour: one line with file, row or field, and remedy; exit code 2."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.evaluation.replay import Replay
from recsys.events.event_files import BATCH_ROWS, names_in, write_events
from recsys.types import Feedback, Item
from services.cli.main import BAD, main
from services.cli.replay_command import progress_bar


@pytest.fixture
def events(tmp_path: Path) -> Path:
    clicks = [
        Feedback(event_id=f"{n}", user_id="u", item_id="i", type="click", time_ms=n, context={"region": n})
        for n in range(3)
    ]
    write_events(tmp_path / "events", [Item(item_id="i", attributes={"kind": "k"})], [], clicks)
    return tmp_path / "events"


def settings(attributes: str = '["kind"]', context: str = "[]") -> str:
    return (
        f"[catalogue]\nattributes = {attributes}\nmultivalued = []\n"
        f"[features]\ncontext = {context}\nhistory_attributes = []\ncrosses = []\n"
    )


def refused(events: Path, capsys: pytest.CaptureFixture[str], config: str, *options: str) -> str:
    path = events.parent / "c.toml"
    path.write_text(config)
    assert main(["replay", "--config", str(path), "--events", str(events), "--json", *options]) == BAD
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def rewrite(path: Path, **columns: object) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"colour": [1, 2, 3]}, ("feedback.parquet", "colour", "leave it out")),
        ({"type": [1, 2, 3]}, ("feedback.parquet", "type", "string")),
        ({"time_ms": [5, 4, 6]}, ("feedback.parquet row 2", "time_ms", "sort")),
        ({"value": [1.0, float("nan"), 2.0]}, ("feedback.parquet row 2", "value", "finite")),
        ({"context": ["{", "{}", "{}"]}, ("feedback.parquet row 1", "context", "JSON")),
    ],
)
def test_bad_columns_are_named_with_file_row_and_remedy(
    events: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, object], words: tuple[str, ...]
) -> None:
    rewrite(events / "feedback.parquet", **columns)
    line = refused(events, capsys, settings())
    assert all(word in line for word in words), line


def test_empty_files_are_named(events: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(events, [Item(item_id="i", attributes={"kind": "k"})], [], [])
    assert "no impression and no feedback" in refused(events, capsys, settings(context='["region"]'))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (settings(attributes='["kind", "price"]'), (), ("catalogue.attributes", "'price'", "['kind']")),
        (settings(context='["regoin"]'), (), ("features.context", "'regoin'", "['region']", "did you mean 'region'")),
        (settings(), ("--set", 'features.context=["regoin"]'), ("features.context", "did you mean 'region'")),
        (settings() + 'numbers = ["kind", "region"]', (), ("features.numbers", "'region'", "['kind']")),
        (
            settings(context='["region"]') + 'numbers = ["region", "pirce"]',
            (),
            ("features.numbers", "'pirce'", "['kind', 'region']"),
        ),
        (settings() + 'time_since = ["last_event", "made"]', (), ("features.time_since", "'made'")),
        (settings() + 'history_types = ["like"]', (), ("features.history_types", "'like'", "['click']")),
        (settings() + 'elsewhere_types = ["view"]', (), ("features.elsewhere_types", "'view'")),
        (settings(), ("--set", 'retrieval.count_types=["clik"]'), ("retrieval.count_types", "did you mean 'click'")),
        (settings() + '[[tasks]]\nname = "t"\ntypes = ["clik"]', (), ("tasks.t.types", "did you mean 'click'")),
        (settings(), ("--tasks", "like"), ("tasks.like.types", "'like'", "['click']")),
        (settings(), ("--sample", "2"), ("--sample 2.0",)),
    ],
)
def test_a_configuration_that_names_what_is_absent_is_refused(
    events: Path, capsys: pytest.CaptureFixture[str], config: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused(events, capsys, config, *options)
    assert all(word in line for word in (*words, *["c.toml"] * ("--sample" not in options))), line


SOURCES_ALONE = '[training]\ntwo_tower = false\n[ranking]\nscorer = "sources"\n'


def test_defaults_and_one_absent_type_of_several_are_no_mistake(
    events: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default tasks have types, the default catalogue attributes, that these events lack."""
    path = events.parent / "c.toml"
    path.write_text('[features]\nhistory_types = ["like", "click"]\n' + SOURCES_ALONE)
    assert main(["replay", "--config", str(path), "--events", str(events), "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_a_name_that_first_occurs_beyond_the_first_batch_is_known(events: Path) -> None:
    items = [Item(item_id=f"{n}", attributes={"late": 1} if n == BATCH_ROWS else {}) for n in range(BATCH_ROWS + 1)]
    write_events(events, items, [], [Feedback(event_id="e", user_id="u", item_id="0", type="click", time_ms=0)])
    found = names_in(events)
    assert (found.attributes, found.context, found.types) == ({"late"}, set(), {"click"})


LATE = BATCH_ROWS + 10


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("time_ms", [*range(1, LATE), 0], (f"feedback_2.parquet row {LATE}", "time_ms", "sort")),
        ("value", [1.0] * (LATE - 1) + [float("nan")], (f"feedback_2.parquet row {LATE}", "value", "finite")),
        ("colour", ["red"] * LATE, ("feedback_2.parquet", "colour", "leave it out")),
    ],
)
def test_a_bad_row_beyond_the_first_batch_is_refused_before_any_event_is_replayed(
    events: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    values: list[object],
    words: tuple[str, ...],
) -> None:
    many = (Feedback(event_id=f"m{n}", user_id="u", item_id="i", type="click", time_ms=n) for n in range(LATE))
    write_events(events / "more", [], [], many)
    (events / "more" / "feedback.parquet").rename(events / "feedback_2.parquet")
    rewrite(events / "feedback_2.parquet", **{column: values})
    stepped: list[object] = []
    monkeypatch.setattr(Replay, "step", lambda _, *event: stepped.append(event))
    line = refused(events, capsys, SOURCES_ALONE)
    assert all(word in line for word in words), line
    assert stepped == []


def test_off_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    for every_s in (0.0, 3600.0):
        with progress_bar("replay", every_s) as progress:
            progress(2000, 0)
            progress(4000, 60_000)
    assert capsys.readouterr().err.splitlines() == [
        "replay: 2,000 events, at 1970-01-01T00:00+00:00",
        "replay: 4,000 events, at 1970-01-01T00:01+00:00",
    ]
