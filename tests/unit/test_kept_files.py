"""Every file of the trainer, with a byte flipped or its end cut off: it starts, says so, and comes to the same rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest

from recsys.clock import ManualClock
from recsys.streams.memory_log import MemoryLog
from recsys.training.runner import Runner
from tests.unit.test_trainer import END, Slowly, answered, configuration, parameters, turns

KINDS = ("manifest.json", "small-*.json", "dense-*", "segment-*.safetensors", "segment-*.copy", "journal-*.jsonl")
PLACES = (0.4, 1.0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryLog, Path, dict[str, np.ndarray]]:
    """A trainer that was killed some steps after its last checkpoint: its log, its folder, and what it knew."""
    log, folder = answered(configuration(tmp_path_factory.mktemp("world"))), tmp_path_factory.mktemp("stopped")
    clock = ManualClock(1_000_000)
    runner = Runner(configuration(folder), Slowly(log, clock), clock)  # type: ignore[arg-type]
    runner.start()
    for turn in turns(runner, clock, END):
        if turn == 75:
            break
    return log, folder, parameters(runner)


def started(log: MemoryLog, folder: Path) -> Runner:
    clock = ManualClock(END)
    runner = Runner(configuration(folder), Slowly(log, clock), clock)  # type: ignore[arg-type]
    runner.start()
    return runner


def damaged(data: bytes, place: float, how: str) -> bytes:
    at = min(int(place * len(data)), len(data) - 1)
    return data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def newest(folder: Path, kind: str) -> list[Path]:
    """Files of the newest checkpoint, and all of the journal."""
    named = (folder / "trainer" / "manifest.json").read_text()
    found = sorted((folder / "trainer").glob(kind))
    return [path for path in found if "*" not in kind or kind[0] == "j" or path.name.removesuffix(".copy") in named]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_leads_to_the_same_rows(  # type: ignore[no-untyped-def]
    kind: str, stopped, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, source, expected = stopped
    for number, place in enumerate(PLACES):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        paths = newest(folder, kind)
        assert paths
        path = paths[number % len(paths)]
        path.write_bytes(damaged(path.read_bytes(), place, "flip"))
        caplog.clear()
        again = parameters(started(log, folder))
        assert kind in ("segment-*.copy", "journal-*.jsonl") or "torn or flipped" in caplog.text
        for name, array in expected.items():
            np.testing.assert_array_equal(again[name], array, err_msg=f"{path.name} at {place}: {name}")


@pytest.mark.parametrize("kind", KINDS[1:4])
def test_a_file_cut_short_or_gone_leads_to_the_same_rows(kind: str, stopped, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    log, source, expected = stopped
    for number, place in enumerate((0.6, None)):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        path = newest(folder, kind)[-1]
        if place is None:
            path.unlink()
        else:
            path.write_bytes(damaged(path.read_bytes(), place, "cut"))
        again = parameters(started(log, folder))
        for name, array in expected.items():
            np.testing.assert_array_equal(again[name], array, err_msg=f"{path.name} at {place}: {name}")


def learned(log: MemoryLog, folder: Path) -> list[int]:
    """Examples and positives trained until all windows of the log are closed."""
    clock = ManualClock(END)
    runner = Runner(configuration(folder), Slowly(log, clock), clock)  # type: ignore[arg-type]
    runner.start()
    for _ in range(20):
        clock.advance(1000)
        runner.turn()
    assert len(runner.trainer.joiner) == 0
    return [runner.trainer.breaker._num_labels, runner.trainer.breaker._num_positives]


@pytest.fixture(scope="module")
def undamaged(stopped, tmp_path_factory: pytest.TempPathFactory) -> list[int]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("undamaged") / "copy"
    shutil.copytree(stopped[1], folder)
    return learned(stopped[0], folder)


@pytest.mark.parametrize("place", [0.0, 0.7, -1.0])
def test_a_journal_that_cannot_be_known_costs_no_label(  # type: ignore[no-untyped-def]
    place: float, stopped, undamaged: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end cut off, or a block of zeros in the middle: the records of its steps are learned in others, each label once."""
    log, source, _ = stopped
    for number, name in enumerate(path.name for path in newest(source, "journal-*.jsonl")):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        path = folder / "trainer" / name
        data = path.read_bytes()
        half = len(data) // 2
        path.write_bytes(data[:half] + bytes(100) + data[half + 100 :] if place < 0 else damaged(data, place, "cut"))
        for _ in range(2):  # and once more, on what the first start left
            assert learned(log, folder) == undamaged
    assert undamaged[1] > 20
    assert place >= 0 or "learned anew" in caplog.text


def test_a_flip_in_spilled_features_costs_that_impression_alone(  # type: ignore[no-untyped-def]
    stopped, undamaged: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, source, _ = stopped
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    (small,) = newest(folder, "small-*.json")
    minute, offset, *_ = orjson.loads(small.read_bytes())["trainer"]["joiner"]["open"][0][5]
    (path,) = folder.rglob(f"{minute}.features")
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 4
    path.write_bytes(data)
    counts = learned(log, folder)
    assert undamaged[0] - 16 <= counts[0] <= undamaged[0] and "torn or flipped" in caplog.text
