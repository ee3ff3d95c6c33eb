"""Deltas: chunks of a version come out whole or not at all."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.errors import BadInput
from recsys.parameters.deltas import CHUNK_BYTES, Delta, DeltaReader, RowDelta, Version, encode_delta, pieces


def rows(count: int, removed: int, layout: str = "deep", dim: int = 3) -> RowDelta:
    rng = np.random.default_rng(count)
    return RowDelta(
        layout=layout,
        slots=rng.integers(0, 3, count).astype(np.int32),
        keys=rng.integers(-(2**63), 2**63 - 1, count),
        values=rng.normal(size=(count, dim)).astype(np.float32),
        last_seen_ms=rng.integers(0, 2**42, count),
        removed_slots=np.zeros(removed, np.int32),
        removed_keys=np.arange(removed, dtype=np.int64),
        default_slots=np.arange(2, dtype=np.int32),
        default_values=np.ones((2, dim), np.float32),
    )


def delta(step: int, *parts: RowDelta, dense: bytes = b"") -> Delta:
    return Delta(
        version=Version(epoch=1, step=step),
        covers_ms=step * 10,
        schema="s",
        rows=parts,
        dense=dense,
        dense_version=len(dense) and step,
    )


def read(reader: DeltaReader, chunks: list[bytes]) -> list[Delta]:
    return [whole for chunk in chunks if (whole := reader.feed(chunk)) is not None]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 60_000), st.integers(0, 3000), st.integers(0, 3 * CHUNK_BYTES))
@example(21_674, 625, 0)
@example(60_000, 60_000, 0)
def test_what_goes_in_comes_out_with_its_last_chunk(count: int, removed: int, dense: int) -> None:
    sent = delta(7, rows(count, removed), rows(3, 0, "wide", 1), dense=bytes(dense))
    chunks = encode_delta(sent)
    assert max(map(len, chunks)) <= CHUNK_BYTES + 4096
    reader = DeltaReader()
    assert read(reader, chunks[:-1]) == []
    (got,) = read(reader, chunks[-1:])
    assert (got.version, got.covers_ms, got.schema, got.dense, got.dense_version) == (
        sent.version,
        70,
        "s",
        sent.dense,
        sent.dense_version,
    )
    for a, b in zip(got.rows, sent.rows, strict=True):
        assert a.layout == b.layout
        for name in RowDelta.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_many_rows_travel_as_several_deltas_of_one_version() -> None:
    given = rows(1000, 1500), rows(10, 0, "wide", 1)
    parts = list(pieces(given, 10_000))
    assert len(parts) > 5 and all(len(part) == 1 for part in parts) and list(pieces(given)) == [given]
    for layout, whole in (("deep", given[0]), ("wide", given[1])):
        own = [part[0] for part in parts if part[0].layout == layout]
        for name in ("slots", "keys", "values", "removed_keys", "default_values"):
            np.testing.assert_array_equal(np.concatenate([getattr(each, name) for each in own]), getattr(whole, name))
    got = read(DeltaReader(), [chunk for part in parts for chunk in encode_delta(delta(3, *part))])
    assert len(got) == len(parts)


def test_another_version_amid_an_unfinished_one_ends_neither() -> None:
    first, second = encode_delta(delta(1, rows(80_000, 0))), encode_delta(delta(2, rows(2, 0)))
    assert len(first) > 2
    got = read(DeltaReader(), [*first[:2], *second, *first[2:]])
    assert [d.version.step for d in got] == [2, 1]


def test_a_resent_chunk_changes_nothing() -> None:
    chunks = encode_delta(delta(1, rows(80_000, 0)))
    resent = [chunk for chunk in chunks for _ in range(2)]
    (got,) = read(DeltaReader(), [resent[0], *resent[2:]])
    assert len(got.rows[0].keys) == 80_000


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 40, (10**6).to_bytes(8, "little") + b"{}"])
def test_what_is_no_delta_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="not a delta"):
        DeltaReader().feed(data)
