"""Texts and rows of the catalogue, against a list and a dict."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.key_rows import RowIndex
from recsys.features.texts import Texts

TEXT = st.text(max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, max_size=40), st.lists(st.tuples(st.integers(0, 39), TEXT), max_size=60))
def test_texts_are_a_list(start: list[str], changes: list[tuple[int, str]]) -> None:
    texts, expected = Texts(start), list(start)
    for row, text in changes:
        if row < len(expected):
            texts[row] = expected[row] = text
        else:
            texts.append(text)
            expected.append(text)
    assert [texts[row] for row in range(len(texts))] == expected
    chosen = np.arange(0, len(texts), 3)
    part = Texts()
    part.restore(*texts.state(len(texts), chosen))
    assert [part[row] for row in range(len(part))] == expected[::3]
    copy = Texts(["something else"])
    copy.restore(*texts.state(len(texts)))
    copy.append("more")
    assert [copy[row] for row in range(len(copy))] == [*expected, "more"]


def test_replaced_texts_give_their_memory_back() -> None:
    texts = Texts(["x" * 1000] * 1000)
    for turn in range(20):
        for row in range(1000):
            texts[row] = f"{turn}" * 1000
    assert len(texts._buffer) < 5e6
    assert texts[999] == "19" * 1000


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=300), st.integers(1, 50))
def test_rows_are_found_by_key_while_they_grow(keys: list[int], step: int) -> None:
    column = np.zeros((1, 2), np.int64)
    index = RowIndex(column)
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        if start + len(part) > len(column):
            column = np.concatenate([column, np.zeros((len(column) + step, 2), np.int64)])
        column[start : start + len(part), 0] = part
        index.add(column, np.arange(start, start + len(part), dtype=np.int32))
        known = keys[: start + len(part)]
        assert index.find_all(np.array(known, np.int64)).tolist() == list(range(len(known)))
        assert [index.find(key) for key in known[-3:]] == list(range(len(known)))[-3:]
    assert all(index.find(key) == -1 for key in (12345, -1, 0) if key not in keys)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-40, 40)), max_size=400))
def test_rows_come_and_go_by_key_as_in_a_dict(changes: list[tuple[bool, int]]) -> None:
    column = np.zeros((81, 1), np.int64)
    index, expected = RowIndex(column), dict[int, int]()
    free = list(range(81))
    for there, key in changes:
        if there and key not in expected:
            expected[key] = free.pop()
            column[expected[key]] = key
            index.add(column, np.array([expected[key]], np.int32))
        elif not there and key in expected:
            index.remove(np.array([expected[key]], np.int32))
            free.append(expected.pop(key))
        assert index.find(key) == expected.get(key, -1)
    wanted = np.arange(-40, 41)
    assert index.find_all(wanted).tolist() == [expected.get(key, -1) for key in wanted.tolist()]


def test_places_of_removed_rows_are_used_again() -> None:
    column = np.zeros((100, 1), np.int64)
    index = RowIndex(column)
    for turn in range(500):
        column[:, 0] = np.arange(100) + 1000 * turn
        index.add(column, np.arange(100, dtype=np.int32))
        assert index.find_all(column[:, 0].copy()).tolist() == list(range(100))
        index.remove(np.arange(100, dtype=np.int32))
        assert index.find(1000 * turn) == -1
    assert len(index._table) == 2**11


def test_many_keys_that_count_up_lie_apart() -> None:
    column = np.arange(200_000, dtype=np.int64)[:, None].copy()
    index = RowIndex(column[:1])
    index.add(column, np.arange(200_000, dtype=np.int32))
    assert index.find_all(np.array([0, 199_999, 200_000, -5])).tolist() == [0, 199_999, -1, -1]
