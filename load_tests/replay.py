"""Real streams through `recsys data convert` and `recsys replay`: what the committed configurations reach, and in which time.

Needs the data folder (`--data`, described in docs/development.md); without it every figure is reported as not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from load_tests.common import ROOT, Report, run, say

GLOBO = ("globo", "globo_clicks_5d.parquet", "globo_counting.toml", "2017-10-03T03:00:00Z")
KUAIRAND = ("kuairand", ".", "kuairand.toml", "2022-04-28T15:05:41.436Z")
FROZEN = ("--sync-interval", "86400", "--freeze-user")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--only", choices=("globo", "kuairand"), help="measure one stream")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Each stream once; frozen days for the ranking quality."""
    with tempfile.TemporaryDirectory(prefix="recsys-replay-") as folder:
        for stream, take in ((GLOBO, globo), (KUAIRAND, kuairand)):
            if not (options.data / stream[1]).exists() or options.only not in (None, stream[0]):
                say(f"{stream[0]}: not measured, {options.data / stream[1]} is missing or left out")
                continue
            events = Path(folder) / stream[0]
            recsys("data", "convert", stream[0], str(options.data / stream[1]), str(events))
            take(stream, events, report)


def globo(stream: tuple[str, str, str, str], events: Path, report: Report) -> None:
    """Hit rate and reciprocal rank of counting alone."""
    now = replay(stream, events)
    report.add("globo_predictions", now["next_item"]["predictions"])
    report.add("globo_hit_rate_at_20", now["next_item"]["hit_rate_at_20"])
    report.add("globo_mrr_at_20", now["next_item"]["mrr_at_20"])
    report.add("globo_replay", now["seconds"])
    report.add("globo_peak_memory", now["peak_memory_bytes"], "bytes")


def kuairand(stream: tuple[str, str, str, str], events: Path, report: Report) -> None:
    """Online AUC and normalised entropy; GAUC with everything frozen at each day's start."""
    at_once = ("--label-delay", "0")
    online, frozen = replay(stream, events, *at_once), replay(stream, events, *at_once, *FROZEN)
    report.add("kuairand_examples", online["tasks"]["click"]["examples"])
    for task, figures in online["tasks"].items():
        report.add(f"kuairand_{task}_auc", figures["auc"], "auc", "higher")
        report.add(f"kuairand_{task}_normalized_entropy", figures["normalized_entropy"], "ratio", "lower")
        report.add(f"kuairand_{task}_frozen_gauc", frozen["tasks"][task]["gauc"], "auc", "higher")
    report.add("kuairand_replay", online["seconds"], "s")
    report.add("kuairand_peak_memory", online["peak_memory_bytes"], "bytes")


def replay(stream: tuple[str, str, str, str], events: Path, *options: str) -> dict[str, Any]:
    """One replay's report."""
    _, _, config, start = stream
    say(f"replaying {stream[0]} {' '.join(options)}")
    return recsys(
        "replay",
        "--config",
        str(ROOT / "deploy" / "configs" / config),
        "--events",
        str(events),
        "--report-from",
        start,
        *options,
    )


def recsys(*command: str) -> dict[str, Any]:
    """Run a command with --json; its result."""
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", *command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.exit(run("replay", measure, arguments))
