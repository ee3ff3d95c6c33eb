"""Costs against another commit: what is no checkout is refused before anything is measured; ratios have intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from load_tests import versus
from load_tests.common import Report


def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(old=tmp_path, turns=1, seed=0)
    with pytest.raises(SystemExit, match="no checkout of this project"):
        versus.measure(options, Report("versus", {}))


def test_figure_is_the_ratio_of_the_sums_with_an_interval() -> None:
    drift = [1.0, 1.5, 2.0, 1.2]
    turns = [dict.fromkeys(("request_cpu", "event_cpu", "idle_cpu"), slow) for slow in drift]
    report = Report("versus", {})
    versus.judge([{name: 3 * value for name, value in turn.items()} for turn in turns], turns, 0, report)
    rows = {row["name"]: row["value"] for row in report.finish()["results"]}
    assert rows["versus_request_cpu"] == pytest.approx(3.0), "a machine that drifts slows both"
    assert rows["versus_request_cpu_low"] == rows["versus_event_cpu_high"] == pytest.approx(3.0)
    noisy = [
        {**turn, "event_cpu": turn["event_cpu"] * factor} for turn, factor in zip(turns, (0.5, 1, 1, 2), strict=True)
    ]
    report = Report("versus", {})
    versus.judge(noisy, turns, 0, report)
    rows = {row["name"]: row["value"] for row in report.finish()["results"]}
    assert rows["versus_event_cpu_low"] < rows["versus_event_cpu"] < rows["versus_event_cpu_high"]
