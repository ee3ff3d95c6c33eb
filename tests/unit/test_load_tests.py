"""The load tests' own arithmetic and driver: a wrong ruler measures nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from load_tests import quality
from load_tests.client import Client, closed_loop, open_loop, poisson
from load_tests.common import RESULTS, Figure, Report, percentile, read_budgets, slowness_of, windowed
from recsys.testing.servers import free_port

TESTS = ("first_answer", "serve", "knee", "ingest")


async def with_server(answer: Callable[[bytes], Awaitable[bytes]], use: Callable[[int], Awaitable[None]]) -> None:
    """A real HTTP server on a free port that gives each request's body to `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            writer.write(await answer(await reader.readexactly(size)))

    async def quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(quietly, "127.0.0.1", 0) as server:
        await use(server.sockets[0].getsockname()[1])


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize(
    ("better", "value", "met"),
    [
        ("lower", 10.0, True),
        ("lower", 10.1, False),
        ("higher", 10.0, True),
        ("higher", 9.9, False),
        ("lower", None, False),
        ("higher", float("inf"), False),
        ("lower", float("nan"), False),
    ],
)
def test_met_is_computed_from_the_budget(better: str, value: float | None, met: bool) -> None:
    row = Figure(name="x", unit="ms", better=better, budget=10.0).row(value)
    assert row["met"] is met
    json.dumps(row, allow_nan=False)


def test_unmeasured_figure_without_a_budget_is_not_met() -> None:
    assert Figure(name="x", unit="ms", better="lower").row(None)["met"] is False


def test_slower_machine_shrinks_times_and_grows_rates_only() -> None:
    scaled = {
        unit: Figure(name="x", unit=unit, better="lower").scaled(6.0, 2.0) for unit in ("ms", "s", "events/s", "bytes")
    }
    assert scaled == {"ms": 3.0, "s": 3.0, "events/s": 12.0, "bytes": 6.0}


def test_slowness_is_the_geometric_mean_of_the_loops_medians() -> None:
    assert slowness_of({"a": [4.0, 99.0, 1.0], "b": [1.0]}, {"a": 1.0, "b": 1.0}) == pytest.approx(2.0)


def test_every_budgeted_figure_is_in_the_result_even_if_never_measured() -> None:
    report = Report("ingest", {"seed": 3})
    report.add("ingest_batch", 30_000.0)
    report.add("memory_ranking", 5, "bytes")
    result = report.finish()
    rows = {row["name"]: row for row in result["results"]}
    assert set(rows) == {"ingest_batch", "ingest_batch_raw", "ingest_single", "memory_ranking"}
    assert rows["ingest_single"]["value"] is None and not rows["ingest_single"]["met"]
    assert rows["ingest_batch_raw"]["value"] == 30_000
    assert rows["ingest_batch"]["value"] == pytest.approx(30_000 * result["calibration"]["slowness"], rel=1e-4)
    assert rows["memory_ranking"]["value"] == 5
    assert result["seed"] == 3
    assert {"commit", "dirty", "hardware", "seed", "calibration", "results"} <= set(result)


def test_kept_figure_is_not_scaled_again_and_says_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": "s", "better": "lower", "budget": None, "met": value is not None}

    report = Report("ingest", {})
    report.add("build", 1.0, "s")
    old = [row("build", 9.0), row("build_raw", 9.0), row("start", 2.0), row("start_raw", 4.0), row("never", None)]
    saved = {"commit": "b" * 40, "kept": {"start": "a" * 40, "start_raw": "a" * 40}, "results": old}
    (tmp_path / "ingest.json").write_text(json.dumps(saved))
    monkeypatch.setattr("load_tests.common.RESULTS", tmp_path)
    report.keep()
    result = report.finish()
    values = {row["name"]: row["value"] for row in result["results"]}
    assert values["build_raw"] == 1.0
    assert (values["start"], values["start_raw"]) == (2.0, 4.0)
    assert "never" not in values
    assert result["kept"] == {"start": "a" * 40, "start_raw": "a" * 40}


def test_figure_reported_twice_or_without_unit_is_refused() -> None:
    report = Report("ingest", {})
    report.add("ingest_batch", 1.0)
    for name in ("ingest_batch", "of no known unit"):
        with pytest.raises(ValueError, match=name):
            report.add(name, 1.0)


def test_percentile_is_a_measured_value() -> None:
    assert [percentile([3, 1, 2, 100], p) for p in (50, 75, 99)] == [2, 3, 100]


def test_one_disturbed_window_does_not_move_the_windowed_percentile() -> None:
    at = np.arange(70) / 10
    values = np.where(at < 1, 500.0, 20.0)
    assert windowed(at.tolist(), values.tolist(), 99) == 20.0
    assert percentile(values.tolist(), 99) == 500.0


def test_poisson_arrivals_repeat_by_seed_and_keep_the_rate() -> None:
    times = poisson(50.0, 100.0, seed=1)
    assert np.array_equal(times, poisson(50.0, 100.0, seed=1))
    assert not np.array_equal(times[:10], poisson(50.0, 100.0, seed=2)[:10])
    assert abs(len(times) - 5000) < 5 * 5000**0.5
    gaps = np.diff(times)
    assert (gaps > 0).all() and times[-1] < 100
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # an exponential's, not evenly spaced
    assert len(poisson(0.0, 10.0, seed=1)) == 0


def test_latency_counts_the_wait_behind_a_slow_service() -> None:
    """Ten requests due at once to a service that takes 20 ms each, one at a time: the last waits for all ten."""
    turn = asyncio.Lock()

    async def slow(body: bytes) -> bytes:
        async with turn:
            await asyncio.sleep(0.02)
        return ok(body)

    async def use(port: int) -> None:
        client = Client(port)

        async def send(number: int) -> bool:
            return (await client.call("POST", "/", b"%d" % number)).body == b"%d" % number

        samples = await open_loop([0.0] * 10, send)
        client.close()
        assert all(sample.ok for sample in samples)
        assert client.opened == 10  # none waited for another's connection
        assert max(s.latency_s for s in samples) >= 0.2
        assert all(s.latency_s >= s.late_s for s in samples)

    asyncio.run(with_server(slow, use))


def test_driver_that_falls_behind_says_so() -> None:
    async def send(number: int) -> bool:
        return True

    samples = asyncio.run(open_loop([-0.5, 0.0], send))
    assert samples[0].late_s >= 0.5 and samples[0].latency_s >= 0.5


def test_client_keeps_its_connection_and_reads_statuses() -> None:
    async def answer(body: bytes) -> bytes:
        return ok(body) if body else b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 4\r\n\r\nbusy"

    async def use(port: int) -> None:
        client = Client(port)
        good, busy = await client.call("POST", "/a", b"[1]"), await client.call("GET", "/b")
        assert good.json() == [1] and (busy.status, busy.body) == (503, b"busy")
        with pytest.raises(RuntimeError, match="503"):
            busy.json()
        assert client.opened == 1
        client.close()

    asyncio.run(with_server(answer, use))


def test_connection_that_ends_too_soon_or_never_begins_is_status_0() -> None:
    async def cut(body: bytes) -> bytes:
        raise asyncio.IncompleteReadError(b"", 1)  # ends this server's connection

    async def use(port: int) -> None:
        assert (await Client(port).call("GET", "/")).status == 0

    asyncio.run(with_server(cut, use))
    assert asyncio.run(Client(free_port()).call("GET", "/")).status == 0


def test_closed_loop_counts_answers_and_refuses_failures() -> None:
    async def send(number: int) -> bool:
        await asyncio.sleep(0.01)
        return number < 1000

    assert 50 < asyncio.run(closed_loop(0.2, 2, send)) <= 200

    async def fail(number: int) -> bool:
        await asyncio.sleep(0.01)
        return number % 2 == 0

    with pytest.raises(RuntimeError, match="calls failed"):
        asyncio.run(closed_loop(0.1, 2, fail))


@pytest.mark.parametrize("test", TESTS)
def test_budgets_are_well_formed(test: str) -> None:
    for name, budget in read_budgets()[test].items():
        assert set(budget) == {"budget", "unit", "better"}, name
        assert budget["better"] in ("higher", "lower"), name


def measured() -> list[Path]:
    """Results of load tests; those of kills and of hostile input are tables of another form."""
    return [path for path in sorted(RESULTS.glob("*.json")) if path.stem in read_budgets()]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in measured()])
def test_committed_result_agrees_with_the_budgets(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["results"]}
    assert len(rows) == len(result["results"])
    for name, budget in read_budgets()[path.stem].items():
        assert rows[name] == Figure(name=name, **budget).row(rows[name]["value"])


def test_saved_differences_stay_only_beside_the_results_they_are_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    part = "kuairand_without_wide"

    def run(area: float) -> dict[str, Any]:
        return {"tasks": {task: {"auc": area} for task in quality.TASKS}}

    runs = {quality.WHOLE: run(0.75), part: run(0.74)}
    known = {part: {task: {"auc": {"a": 0.75, "b": 0.74, "difference": -0.01}} for task in quality.TASKS}}
    assert quality.paired(known, runs) == known
    assert quality.paired(known, runs | {part: run(0.73)}) == quality.paired(known, {}) == {}
    for name, predictions in ((quality.WHOLE, [0.1, 0.9]), (part, [0.9, 0.1])):
        rows = {"prediction": predictions, "label": [False, True], "user": [1, 2], "day": [1, 1]}
        tasks = [pa.table({"task": [task] * 2, **rows}) for task in quality.TASKS]
        pq.write_table(pa.concat_tables(tasks), tmp_path / f"{name}.parquet")
    assert quality.paired(known, runs)[part]["click"]["auc"]["difference"] == -1.0
