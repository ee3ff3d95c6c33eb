"""Rows of the catalogue: whose they are, and when they become another item's."""

from __future__ import annotations

import threading

import numpy as np

from recsys.config import parse
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.types import Int32, Item

SCHEMA = Schema.of(parse({}))
ALL = 400


def put(catalogue: Catalogue, day: int, count: int = ALL) -> None:
    for n in range(count):
        catalogue.apply(Item(item_id=f"d{day}-{n}", title=f"t{day}-{n}", attributes={"category": f"c{day}-{n}"}))


def drop(catalogue: Catalogue, day: int, count: int = ALL) -> None:
    for n in range(count):
        catalogue.apply(Item(item_id=f"d{day}-{n}", deleted=True))


def churned(days: int = 30, **options: float) -> Catalogue:
    catalogue = Catalogue(SCHEMA, **options)  # type: ignore[arg-type]
    for day in range(days):
        put(catalogue, day)
        if day:
            drop(catalogue, day - 1)
        catalogue.free_rows()
    return catalogue


def test_rows_texts_and_labels_follow_the_items_alive() -> None:
    catalogue = churned()
    assert catalogue.num_alive == ALL and len(catalogue) <= 3 * ALL
    assert len(catalogue.labels) <= 4 * ALL + 2048
    assert catalogue.titles._holes < 2**20
    arrays = catalogue.state()
    assert len(arrays["alive"]) <= 1.3 * ALL  # a file holds no row without an item
    assert [catalogue.item(int(catalogue.row(f"d29-{n}") or 0)).title for n in (0, 399)] == ["t29-0", "t29-399"]


def test_deleted_items_are_known_for_a_while_and_live_again() -> None:
    catalogue = Catalogue(SCHEMA)
    put(catalogue, 0)
    drop(catalogue, 0, 100)
    catalogue.free_rows()
    row = catalogue.row("d0-99")
    assert row is not None and not catalogue.alive[row] and catalogue.row("d0-0") is None
    catalogue.apply(Item(item_id="d0-99", title="again"))
    assert catalogue.row("d0-99") == row and catalogue.item(row).title == "again" and catalogue.num_alive == 301


def test_a_row_is_not_another_items_while_somebody_who_saw_the_first_reads() -> None:
    catalogue = Catalogue(SCHEMA, keep=0.0)
    put(catalogue, 0)
    reading, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def read() -> None:
        with catalogue.reading():
            row = catalogue.row("d0-7") or 0
            reading.set()
            go_on.wait(20)
            seen.append(catalogue.ids[row])

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(20)
    drop(catalogue, 0)
    for day in range(1, 4):
        catalogue.free_rows()
        put(catalogue, day)
    assert len(catalogue) == 4 * ALL
    go_on.set()
    reader.join()
    assert seen == ["d0-7"]
    catalogue.free_rows()
    put(catalogue, 5)
    assert len(catalogue) == 4 * ALL and catalogue.item(catalogue.row("d5-7") or 0).title == "t5-7"


def test_who_keeps_things_by_row_is_told_before_it_is_another_items() -> None:
    catalogue = Catalogue(SCHEMA, keep=0.0)
    owners: dict[int, str] = {}

    def told(rows: Int32) -> None:
        for row in rows.tolist():
            assert catalogue.row(owners.pop(row)) is None

    catalogue.on_free.append(told)
    rng = np.random.default_rng(0)
    for turn in range(3000):
        name = f"i{rng.integers(60)}"
        row = catalogue.apply(Item(item_id=name, deleted=bool(rng.integers(2)), title=str(turn)))
        if row >= 0:
            assert owners.setdefault(row, name) == name
        catalogue.free_rows()
    assert len(catalogue) <= 61


def test_newest_and_pages_do_not_follow_rows() -> None:
    catalogue = churned(4)
    rows = catalogue.newest(3)
    assert [catalogue.ids[row] for row in rows.tolist()] == ["d3-399", "d3-398", "d3-397"]
    restored = Catalogue(SCHEMA)
    restored.restore(catalogue.state())
    assert [restored.ids[row] for row in restored.newest(3).tolist()] == ["d3-399", "d3-398", "d3-397"]
    first = catalogue.page(None, 250)
    after = int(catalogue.keys[catalogue.row(first[-1].item_id) or 0, 0])
    second = restored.page(after, 250)
    assert len(first) == 250 and len(second) == 150
    assert {item.item_id for item in (*first, *second)} == {f"d3-{n}" for n in range(ALL)}


def test_what_was_restored_goes_on_as_what_was_saved() -> None:
    first = churned(3)
    second = Catalogue(SCHEMA)
    second.restore(first.state())
    for catalogue in (first, second):
        drop(catalogue, 2, 200)
        catalogue.free_rows()
        put(catalogue, 9, 100)
    names = [f"d{day}-{n}" for day in (2, 9) for n in range(ALL)]
    for name in names:
        rows = first.row(name), second.row(name)
        found = [
            None if row is None or c.item(row).deleted else c.item(row)
            for c, row in zip((first, second), rows, strict=True)
        ]
        assert found[0] == found[1]
