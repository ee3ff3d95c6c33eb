"""Costs against another commit: what is no checkout is refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from load_tests import versus
from load_tests.common import Report


def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(old=tmp_path, alternations=1, seed=0)
    with pytest.raises(SystemExit, match="no checkout of this project"):
        versus.measure(options, Report("versus", {}))


def test_figure_is_the_geometric_mean_of_the_turns_with_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "services").mkdir()
    costs = {versus.ROOT: 2.0, tmp_path.resolve(): 1.0}

    def serve(options: argparse.Namespace, root: Path, turn: int) -> dict[str, float]:
        return dict.fromkeys(versus.FIGURES, costs[root] * (1.1 if turn else 1.0))

    monkeypatch.setattr(versus, "serve", serve)
    report = Report("versus", {})
    versus.measure(argparse.Namespace(old=tmp_path, alternations=3, seed=0), report)
    rows = {row["name"]: row["value"] for row in report.finish()["results"]}
    assert rows["versus_request_cpu"] == rows["versus_request_cpu_low"] == rows["versus_event_cpu_high"] == 2.0
