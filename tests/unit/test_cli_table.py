"""`recsys table inspect` on the files of a real chain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import orjson
import pytest

from recsys.table import segments
from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.tables import Tables
from services.cli.main import main

DAY_MS = 86_400_000


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Two files: 300 rows of slot 0, a day later 40 of them again and 20 of slot 3, of which 5 go."""
    folder = tmp_path / "data" / "trainer"
    folder.mkdir(parents=True)
    slots = {0: SlotPolicy(), 3: SlotPolicy(), 4: SlotPolicy(admission=9)}
    tables = Tables([Layout(name="deep", segments=(Segment(name="deep", dim=4),), slots=slots)])
    table, chain = tables["deep"], []
    for n in range(2):
        if n == 0:
            table.lookup_train(np.zeros(300, np.int32), np.arange(300), now_ms=8000)
        else:
            table.lookup_train(np.zeros(40, np.int32), np.arange(40), now_ms=8000 + DAY_MS)
            table.apply_gradients(np.zeros(40, np.int32), np.arange(40), np.ones((40, 4), np.float32), 8000 + DAY_MS)
            table.lookup_train(np.full(20, 3, np.int32), np.arange(20), now_ms=8000 + DAY_MS)
            table.lookup_train(np.full(1, 4, np.int32), np.arange(1), now_ms=8000 + DAY_MS)
            table.remove(np.full(5, 3, np.int32), np.arange(5))
        delta, versions = segments.take(tables, "checkpoint")
        chain = segments.extend(folder, chain, f"segment-{n}", delta)
        segments.acknowledge(tables, "checkpoint", versions)
    (folder / "manifest.json").write_bytes(orjson.dumps({"schema": "x", "step": 7, "segments": chain}))
    return folder


def test_inspect_tells_rows_load_bytes_slots_and_ages(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "inspect", str(snapshot), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    table = result["tables"]["deep"]
    assert (result["step"], result["files"], table["rows"], table["values"], table["state"]) == (7, 2, 315, 4, 1)
    assert table["slots"] == {"0": 300, "3": 15} and table["waiting_for_admission"] == 1
    assert table["age"]["<= 1 m"] == 55 and table["age"]["<= 1 d"] == 260 and sum(table["age"].values()) == 315
    assert 0 < table["load"] < 0.8 and table["memory_bytes"] > 315 * 20
    assert result["file_bytes"] == sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    assert main(["table", "inspect", str(snapshot / "manifest.json")]) == 0
    assert "deep: 315 rows of 4 + 1 numbers" in capsys.readouterr().out


def test_inspect_names_what_is_wrong(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "inspect", str(snapshot.parents[1])]) == 2
    assert "below it there is data/trainer" in capsys.readouterr().err
    for path in snapshot.glob("segment-0-*"):  # the file and its copy
        path.write_bytes(path.read_bytes()[:-9])
    assert main(["table", "inspect", str(snapshot), "--json"]) == 2
    out = capsys.readouterr()
    assert "segment-0-" in json.loads(out.out)["why"] and "torn or flipped" in out.err
    (snapshot / "manifest.json").write_text("[]")
    assert main(["table", "inspect", str(snapshot)]) == 2
    assert "no manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"segments": 5},
        {"segments": {"a": 1}},
        {"segments": [7]},
        {"segments": ["x"]},
        {"segments": [{"name": 3, "checksum": "", "bytes": 1}]},
        {"segments": [{"checksum": "", "bytes": 1}]},
        {"segments": [{"name": "x"}]},
        {"bytes": "many"},
        {"blocks": 1.5},
        {"schema": ["x"]},
    ],
)
def test_a_manifest_that_says_something_else_is_named(
    snapshot: Path, wrong: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = snapshot / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    of_a_file = {name: wrong[name] for name in ("bytes", "blocks") if name in wrong}
    manifest["segments"][0] |= of_a_file
    path.write_bytes(orjson.dumps(manifest | {name: wrong[name] for name in wrong if name not in of_a_file}))
    if of_a_file.get("blocks"):
        for torn in snapshot.glob("segment-0-*"):
            torn.write_bytes(b"")
    assert main(["table", "inspect", str(snapshot), "--json"]) == (0 if "schema" in wrong else 2)
    found = json.loads(capsys.readouterr().out)
    assert "schema" in wrong or str(snapshot) in found["why"]
