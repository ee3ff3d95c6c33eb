"""`recsys audit`: whether everything that was accepted is accounted for, and whether the state is what the log makes."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from recsys import config
from recsys.clock import SystemClock
from recsys.errors import BadInput
from recsys.streams.open_log import open_log
from services.cli.main import DONE, MISSED, emit
from services.cli.progress import progress_bar


def run(options: argparse.Namespace) -> int:
    """Exit code 1 when a sum does not close or a re-run is not equal."""
    loaded = config.load(options.config)
    if not (loaded.data_dir / "trainer").is_dir():
        raise BadInput(f"{loaded.data_dir / 'trainer'} does not exist: no trainer ever ran with this data_dir")
    result = _rerun(loaded) if options.replay else _account(loaded)
    emit(options, result, (_said if options.replay else _closed)(result))
    return DONE if result["ok"] else MISSED


def _account(loaded: config.Config) -> dict[str, Any]:
    from services.cli.account import account

    log = open_log(loaded, SystemClock(), "audit")
    try:
        with progress_bar("audit", unit="records") as tell:
            return account(loaded, log, tell)
    finally:
        log.close()


def _closed(result: dict[str, Any]) -> str:
    """The ledger as a table, then what does not close."""
    names = ("accepted", "learned", "waiting", "late", "duplicate", "dead_lettered", "gap")
    lines = [f"{'':<14}" + "".join(f"{name:>14}" for name in names)]
    for key, counts in result["partitions"].items():
        lines.append(f"{key:<14}" + "".join(f"{counts[name]:>14,}" for name in names))
    for task, labels in result["labels"].items():
        known = ("positive", "negative", "masked", "unlearned", "dropped", "waiting")
        lines.append(f"labels of {task}: " + ", ".join(f"{labels.get(n, 0):,} {n}" for n in known if labels.get(n)))
    said = "everything accepted is accounted for" if result["closes"] else "does not close:"
    return "\n".join([*lines, f"as of step {result['cut']['step']}: {said}", *result["why"]])


def _rerun(loaded: config.Config) -> dict[str, Any]:
    from recsys.training.rerun import rerun  # loads torch

    clock = SystemClock()
    log = open_log(loaded, clock, "audit")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="recsys-audit-") as scratch,
            progress_bar("audit", unit="steps") as tell,
        ):
            found = rerun(loaded, log, clock, Path(scratch), tell)
    finally:
        log.close()
    return {
        "ok": not found.differences,
        "equal": not found.differences,
        "from_step": found.begin,
        "to_step": found.end,
        "served_step": found.served_step,
        "differences": list(found.differences[:100]),
    }


def _said(result: dict[str, Any]) -> str:
    if not result["equal"]:
        return "\n".join(["not equal:", *result["differences"]])
    served = (
        f"; the serving copy of step {result['served_step']} has the same rows" if result["served_step"] >= 0 else ""
    )
    return f"steps {result['from_step']} to {result['to_step']} run again: equal bit for bit{served}"
