"""The item index and its exact buffer, against comparing every vector."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from recsys.errors import SnapshotCorrupt
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.types import Float32, Int32


def clustered(count: int, dim: int, seed: int) -> Float32:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(200, dim))
    return (centres[generator.integers(0, 200, count)] + 0.6 * generator.normal(size=(count, dim))).astype(np.float32)


def exact(rows: Int32, vectors: Float32, user: Float32, k: int) -> list[int]:
    cosines = vectors @ user / np.linalg.norm(vectors, axis=1)
    return rows[np.lexsort((rows, -cosines))[:k]].tolist()


@pytest.fixture
def small() -> tuple[Int32, Float32]:
    return (np.arange(500, dtype=np.int32) * 3 + 1), clustered(500, 8, 1)


def test_search_finds_what_comparing_everything_finds(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors))
    for seed in range(5):
        user = np.random.default_rng(seed).normal(size=8).astype(np.float32)
        found, scores = searcher.search(user, 20)
        assert found.tolist() == exact(rows, vectors, user, 20)
        assert np.all(np.diff(scores) <= 0)
        assert np.all(np.abs(scores) <= 1.0001)


def test_buffer_changes_and_deletions_hold_at_once(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors))
    generator = np.random.default_rng(2)
    truth = dict(zip(rows.tolist(), vectors, strict=True))
    for step in range(300):
        row = int(generator.integers(0, 1700))
        if step % 3 == 0:
            truth.pop(row, None)
            searcher.delete(row)
        else:
            truth[row] = generator.normal(size=8).astype(np.float32)
            searcher.put(np.array([row], np.int32), truth[row][None])
    user = generator.normal(size=8).astype(np.float32)
    alive = np.array(sorted(truth), np.int32)
    expected = exact(alive, np.stack([truth[row] for row in alive.tolist()]), user, 60)
    assert searcher.search(user, 30)[0].tolist() == expected[:30]
    assert (
        searcher.search(user, 30, exclude=set(expected[:30:2]))[0].tolist()
        == [r for r in expected if r not in expected[:30:2]][:30]
    )


def test_k_beyond_the_catalogue_gives_all_of_it(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors))
    searcher.put(np.array([0], np.int32), vectors[:1])
    searcher.delete(1)
    found, _ = searcher.search(vectors[0], 10_000)
    assert sorted(found.tolist()) == [0, *rows.tolist()[1:]]
    nothing = Searcher(ItemIndex.build(np.zeros(0, np.int32), np.zeros((0, 8), np.float32)))
    assert nothing.search(vectors[0], 5)[0].tolist() == []
    nothing.put(np.array([4], np.int32), vectors[:1])
    assert nothing.search(vectors[0], 5)[0].tolist() == [4]


def test_a_full_buffer_falls_back_to_the_index_and_counts_what_it_lacks(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors), limit=2)
    searcher.put(rows[:1], -vectors[:1])
    assert rows[0] not in searcher.search(vectors[0], 3)[0]
    searcher.put(np.array([2, 3], np.int32), vectors[1:3])
    assert searcher.search(vectors[0], 1)[0].tolist() == [int(rows[0])]
    assert (searcher.num_buffered, searcher.dropped) == (2, 0)
    searcher.put(np.array([5], np.int32), vectors[3:4])
    assert (searcher.num_buffered, searcher.dropped) == (2, 1)


def test_vectors_without_direction_are_refused_by_name(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors))
    broken = vectors.copy()
    broken[7] = 0
    with pytest.raises(ValueError, match=f"row {rows[7]}"):
        ItemIndex.build(rows, broken)
    with pytest.raises(ValueError, match="row 9"):
        searcher.put(np.array([9], np.int32), np.full((1, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match="nan"):
        searcher.search(np.full(8, np.nan, np.float32), 3)
    with pytest.raises(ValueError, match="shape"):
        searcher.search(np.ones(7, np.float32), 3)
    with pytest.raises(ValueError, match="distinct"):
        ItemIndex.build(np.array([1, 1], np.int32), vectors[:2])
    assert searcher.search(np.zeros(8, np.float32), 3)[0].tolist() == []


def test_saved_index_answers_the_same_and_a_torn_one_is_refused(small: tuple[Int32, Float32], tmp_path: Path) -> None:
    rows, vectors = small
    path = tmp_path / "items.index"
    index = ItemIndex.build(rows, vectors)
    index.save(path)
    index.save(path)
    first, second = Searcher(index), Searcher(ItemIndex.load(path))
    for one, other in zip(first.search(vectors[3], 10), second.search(vectors[3], 10), strict=True):
        np.testing.assert_array_equal(one, other)
    whole = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["items.index"]
    cuts = [whole[:at] for at in (*range(0, len(whole), 4096), 10, len(whole) - 20, len(whole) - 1)]
    places = {*range(0, len(whole), len(whole) // 60), *range(len(whole) - 40, len(whole))}
    flips = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in sorted(places)]
    for damaged in cuts + flips:
        path.write_bytes(damaged)
        with pytest.raises(SnapshotCorrupt, match=r"items\.index"):
            ItemIndex.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not faiss.get_num_gpus(), reason="needs a CUDA device")
def test_a_gpu_builds_lists_as_good_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, rows = clustered(60_000, 8, 3), np.arange(60_000, dtype=np.int32)
    by_gpu = ItemIndex.build(rows, vectors)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    by_cpu = ItemIndex.build(rows, vectors)
    assert by_gpu.recall >= by_cpu.recall - 0.01
    np.testing.assert_array_equal(np.sort(by_gpu.rows), rows)


def test_large_index_finds_nearly_all_and_is_deterministic(tmp_path: Path) -> None:
    vectors = clustered(50_400, 8, 3)
    rows = np.random.default_rng(0).permutation(50_400).astype(np.int32)
    index = ItemIndex.build(rows, vectors)
    index.save(tmp_path / "large")
    searcher, again = Searcher(index), Searcher(ItemIndex.load(tmp_path / "large"))
    hits = 0
    for user in clustered(20, 8, 4):
        expected = exact(rows, vectors, user, 50)
        searcher.delete(expected[0])
        again.delete(expected[0])
        found = searcher.search(user, 50)[0].tolist()
        assert found == again.search(user, 50)[0].tolist()
        assert expected[0] not in found
        hits += len(set(found) & set(expected[1:]))
    assert hits >= 0.95 * 20 * 49


@pytest.mark.parametrize("size", [3000, 60_000])
def test_filters_and_exclusions_do_not_starve_the_result(size: int) -> None:
    vectors = clustered(size, 8, 5)
    rows = np.random.default_rng(0).permutation(size + 50).astype(np.int32)[:size]
    searcher = Searcher(ItemIndex.build(rows, vectors))
    searcher.put(np.array([size + 50], np.int32), vectors[:1] + 0.01)
    rows, vectors = np.append(rows, np.int32(size + 50)), np.concatenate([vectors, vectors[:1] + np.float32(0.01)])
    kind = (vectors @ np.random.default_rng(1).normal(size=(8, 20))).argmax(1)
    generator = np.random.default_rng(2)
    for share in (0.01, 0.1, 0.6, "kind"):
        passes = kind == 3 if share == "kind" else generator.random(len(rows)) < share
        allowed = np.zeros(size + 51, np.bool_)
        allowed[rows[passes]] = True
        hits = total = 0
        for user in clustered(20, 8, 6):
            among = exact(rows[passes], vectors[passes], user, 60)
            excluded = set(among[::3])
            found = searcher.search(user, 40, excluded, allowed)[0].tolist()
            assert len(found) == min(40, passes.sum() - len(excluded))
            assert allowed[found].all() and not excluded & set(found)
            expected = [row for row in among if row not in excluded][: len(found)]
            hits, total = hits + len(set(found) & set(expected)), total + len(expected)
        assert hits >= 0.95 * total


def test_a_filter_that_matches_nothing_finds_nothing(small: tuple[Int32, Float32]) -> None:
    searcher = Searcher(ItemIndex.build(*small))
    searcher.put(np.array([7000], np.int32), small[1][:1])
    for allowed in (np.zeros(8000, np.bool_), np.zeros(0, np.bool_)):
        assert searcher.search(small[1][0], 5, (), allowed)[0].tolist() == []
    only = np.zeros(8000, np.bool_)
    only[[7000, int(small[0][3])]] = True
    assert sorted(searcher.search(small[1][0], 5, {7000, -1, 99_999}, only)[0].tolist()) == [int(small[0][3])]


def test_interests_are_searched_each_and_merged(small: tuple[Int32, Float32]) -> None:
    rows, vectors = small
    searcher = Searcher(ItemIndex.build(rows, vectors))
    users = clustered(3, 8, 7)
    users /= np.linalg.norm(users, axis=1, keepdims=True)
    cosines = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ users.T
    expected = np.lexsort((rows, -cosines.max(1)))[:25]
    found, scores = searcher.search(users, 25)
    assert found.tolist() == rows[expected].tolist()
    np.testing.assert_allclose(scores, cosines.max(1)[expected], atol=1e-6)
    assert searcher.search(np.zeros((2, 8), np.float32), 5)[0].tolist() == []


@pytest.mark.parametrize("size", [700, 51_000])
def test_hubs_are_corrected_by_the_published_formula(size: int, tmp_path: Path) -> None:
    vectors, beta = clustered(size, 8, 8), 6.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.arange(size, dtype=np.int32)
    ItemIndex.build(rows, vectors, beta).save(tmp_path / "index")
    index = ItemIndex.load(tmp_path / "index")
    assert index.hubs is not None and index.dim == 8
    new = clustered(3, 8, 9)
    searcher = Searcher(index)
    searcher.put(np.arange(size, size + 3, dtype=np.int32), new)
    everything = np.concatenate([vectors, new / np.linalg.norm(new, axis=1, keepdims=True)]).astype(np.float64)
    cosines = everything @ index.hubs.bank.astype(np.float64).T
    weights = np.where(cosines < 1 - 1e-5, np.exp(beta * cosines), np.nan)
    bias = np.log(np.nanmean(weights, axis=1)) / beta
    hits = 0
    for user in clustered(20, 8, 10):
        truth = everything @ (user / np.linalg.norm(user)) - bias
        found, scores = searcher.search(user, 30)
        np.testing.assert_allclose(scores, truth[found], atol=2e-3)
        hits += np.count_nonzero(truth[found] >= np.sort(truth)[-30] - 2e-3)
        allowed = np.zeros(size + 3, np.bool_)
        allowed[::7] = True
        among = searcher.search(user, 30, (), allowed)[0]
        assert len(set(among.tolist()) & set(np.argsort(-np.where(allowed, truth, -9))[:30].tolist())) >= 25
    assert hits >= 0.95 * 20 * 30


def test_corrected_hubs_are_in_fewer_lists() -> None:
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(3000, 32)) + 0.6).astype(np.float32)  # a common part makes hubs
    rows = np.arange(3000, dtype=np.int32)

    def skewness(hubness: float) -> float:
        """Of how often each item is among the ten nearest to another: the measure of hubness."""
        searcher = Searcher(ItemIndex.build(rows, vectors, hubness))
        counts = np.zeros(3000)
        for vector in vectors[:1500]:
            counts[searcher.search(vector, 10)[0]] += 1
        centred = counts - counts.mean()
        return float((centred**3).mean() / (centred**2).mean() ** 1.5)

    assert skewness(20.0) < 0.7 * skewness(0.0)


def test_items_that_all_look_the_same_are_found_whatever_is_corrected() -> None:
    vectors = np.ones((60, 4), np.float32)
    searcher = Searcher(ItemIndex.build(np.arange(60, dtype=np.int32), vectors, 20.0))
    assert len(searcher.search(vectors[0], 10)[0]) == 10
