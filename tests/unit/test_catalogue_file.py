"""The catalogue's file: what is restored is what was read from the log, and what cannot be trusted is not used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.candidates.followed import FollowedSource
from recsys.candidates.registry import one_of
from recsys.candidates.sources import Sources
from recsys.config import parse
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Clause
from recsys.features.schema import Schema
from recsys.files import seal, unseal
from recsys.ranking import catalogue_file
from recsys.types import Item

CONFIG = parse({"catalogue": {"attributes": ["category", "tags", "price"], "multivalued": ["tags"]}})
SCHEMA = Schema.of(CONFIG)
NOW_MS = 1_700_000_000_000
BOUNDS = {0: (0, 500)}


def filled(num_items: int = 150) -> Sources:
    sources = Sources(CONFIG, SCHEMA, Catalogue(SCHEMA))
    generator = np.random.default_rng(0)
    for n in range(num_items):
        tags = [f"t{t}" for t in generator.integers(0, 9, int(generator.integers(0, 4)))]
        attributes = {"category": f"k{n % 7}", "tags": tags, "price": float(n)} if n % 5 else {"tags": tags}
        sources.item(Item(item_id=f"i{n}", title=f"Ünïcode {n}", attributes=attributes))
    for n in range(0, num_items, 11):
        sources.item(Item(item_id=f"i{n}", deleted=True))
    sources.item(Item(item_id="i1", title="again", attributes={"category": "k6"}))
    return sources


def restored(folder: Path, now_ms: int = NOW_MS, bounds: dict[int, tuple[int, int]] = BOUNDS) -> Sources | None:
    sources = Sources(CONFIG, SCHEMA, Catalogue(SCHEMA))
    found = catalogue_file.load(folder, sources, SCHEMA, bounds, now_ms)
    assert found == {0: 400} or (found is None and not len(sources.catalogue))
    return sources if found else None


def test_restored_catalogue_answers_as_the_one_that_read_the_log(tmp_path: Path) -> None:
    first = filled()
    catalogue_file.save(tmp_path, first, SCHEMA, {0: 400}, {}, NOW_MS)
    catalogue_file.save(tmp_path, first, SCHEMA, {0: 400}, {}, NOW_MS + 1)
    second = restored(tmp_path)
    assert second is not None and len(list(tmp_path.iterdir())) == 4
    for sources in (first, second):  # and it goes on
        sources.item(Item(item_id="i2", title="x", attributes={"category": "k6", "tags": ["t1", "new"]}))
        sources.item(Item(item_id="later", attributes={"category": "k3", "price": 7}))
        sources.item(Item(item_id="i3", deleted=True))
    one, other = first.catalogue, second.catalogue
    assert (len(one), one.num_alive) == (len(other), other.num_alive)
    assert [one.item(row) for row in range(len(one))] == [other.item(row) for row in range(len(one))]
    assert [one.row(f"i{n}") for n in range(301)] == [other.row(f"i{n}") for n in range(301)]
    assert one.labels.state().tobytes() == other.labels.state().tobytes()
    size = len(one)
    for name in ("keys", "mask", "alive"):
        np.testing.assert_array_equal(getattr(one, name)[:size], getattr(other, name)[:size])
    filters = (Clause(attribute="price", low=20, high=90), Clause(attribute="tags", any=("t1", "t2")))
    np.testing.assert_array_equal(one.matching(filters)[:size], other.matching(filters)[:size])
    for attribute, key in {(a, int(k)) for a, c in ((0, 1), (1, 2), (1, 3)) for k in one.keys[:size, c] if k}:
        for sources in (first, second):
            one_of(sources.by_name, FollowedSource).index.note(40)
        query = [(attribute, key, 1.0)]
        found = [
            sorted(one_of(sources.by_name, FollowedSource).index.query(query, 500)[0].tolist())
            for sources in (first, second)
        ]
        assert found[0] == found[1]  # what moved between values counts as new in its row's order


def test_a_file_that_cannot_be_trusted_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert restored(tmp_path) is None and not caplog.records
    catalogue_file.save(tmp_path, filled(), SCHEMA, {0: 400}, {}, NOW_MS)
    day_ms = 86_400_000
    assert restored(tmp_path, now_ms=NOW_MS + day_ms) is None
    assert restored(tmp_path, now_ms=NOW_MS + day_ms, bounds={0: (0, 400)}) is not None
    assert restored(tmp_path, bounds={0: (0, 399)}) is None
    assert restored(tmp_path, bounds={0: (0, 500), 1: (0, 0)}) is None
    columns = next(tmp_path.glob("*.columns"))
    whole = columns.read_bytes()
    for damaged in (whole[:-1], whole[:1000], b"", whole + b"x", whole[:99] + b"\x7f" + whole[100:]):
        columns.write_bytes(damaged)
        assert restored(tmp_path) is None
    columns.unlink()
    assert restored(tmp_path) is None
    manifest = unseal((tmp_path / "catalogue.json").read_bytes())
    (tmp_path / "catalogue.json").write_bytes(seal(manifest | {"schema": "other"}))
    assert restored(tmp_path) is None
    assert "schema other" in caplog.text and "h ago" in caplog.text and "torn" in caplog.text


def test_an_empty_catalogue_is_kept_too(tmp_path: Path) -> None:
    catalogue_file.save(tmp_path, Sources(CONFIG, SCHEMA, Catalogue(SCHEMA)), SCHEMA, {0: 400}, {}, NOW_MS)
    second = restored(tmp_path)
    assert second is not None and second.item(Item(item_id="a")) == 0
