"""A data folder of an earlier version opens with nothing lost: histories, catalogue, rows, clusters, labels that waited."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.embedded import Embedded, wait_for

pytestmark = pytest.mark.system

GOLDEN = Path(__file__).parents[1] / "golden"
SHOWN = 8
"""Items of each of its answers."""
NEVER_EXPIRES = "table.expiry_s = 1e10\nbandit.expiry_s = 1e10\n"
"""The folder grows old on the disk, and its rows with it."""


def by_label(system: Embedded, service: str, name: str) -> dict[str, float]:
    """A metric's samples by the text of their labels."""
    lines = httpx.get(f"{system.url(service)}/metrics", timeout=5.0).text.splitlines()
    return {
        line.split("{")[1].split("}")[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(f"{name}{{")
    }


@pytest.mark.parametrize("name", ["data-2026-11"])
def test_data_folder_of_an_earlier_version_opens_with_nothing_lost(name: str, tmp_path: Path) -> None:
    expected: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    system = Embedded(tmp_path / "golden", NEVER_EXPIRES)
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(system.folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.4
    try:
        system.start()
        for user_id, events in expected["histories"].items():
            assert system.history(user_id) == events
        assert system.metric("recsys_catalogue_items") == expected["items_alive"]
        clusters = expected["clusters"]
        wait_for(lambda: system.metric("recsys_bandit_clusters", "trainer") >= clusters, "the clusters are there")

        def labels_after() -> dict[str, float]:
            return by_label(system, "trainer", "recsys_examples_total")

        def labels(task: str, which: dict[str, float]) -> float:
            return sum(count for label, count in which.items() if f'task="{task}"' in label)

        # Every label that waited when the processes were killed is learned now, each once.
        wait_for(lambda: system.metric("recsys_open_impressions", "trainer") == 0, "the open impressions are learned")
        wait_for(
            lambda: labels("like", labels_after()) == expected["open_impressions"] * SHOWN,
            f"each like is learned once ({labels_after()})",
        )
        learned = labels("click", expected["labels"]) + labels("click", labels_after())
        assert learned == expected["open_impressions"] * SHOWN
        rows = wait_for(lambda: same_rows(system), "serving has the trainer's rows")
        for layout, count in expected["trainer_rows"].items():
            assert rows[f'layout="{layout}"'] >= count
        answer = system.call("POST", "/v1/recommend", {"user_id": "user-0", "n": 10})
        assert len(answer["items"]) == 10 and not answer["degraded"]
        assert len({item["predictions"]["click"] for item in answer["items"]}) > 1
    finally:
        system.close()


def same_rows(system: Embedded) -> dict[str, float]:
    """Rows by layout where trainer and parameter service agree, else nothing."""
    trained, served = (by_label(system, service, "recsys_table_rows") for service in ("trainer", "parameter"))
    return trained if trained == served else {}
