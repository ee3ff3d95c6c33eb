"""`recsys replay` refuses what cannot be right before it spends an hour: one line with file, row or field, and remedy; exit code 2."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.events.files import write_events
from recsys.types import Feedback, Item
from services.cli.main import BAD, main


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


def refused(events: Path, capsys: pytest.CaptureFixture[str], config: str) -> str:
    path = events.parent / "c.toml"
    path.write_text(config)
    assert main(["replay", "--config", str(path), "--events", str(events), "--json"]) == BAD
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
    assert "no impression and no feedback" in refused(events, capsys, settings())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (settings(attributes='["kind", "price"]'), ("catalogue.attributes", "'price'", "['kind']")),
        (settings(context='["regoin"]'), ("features.context", "'regoin'", "['region']")),
    ],
)
def test_a_configuration_that_names_an_absent_field_is_refused(
    events: Path, capsys: pytest.CaptureFixture[str], config: str, words: tuple[str, ...]
) -> None:
    line = refused(events, capsys, config)
    assert all(word in line for word in words), line
