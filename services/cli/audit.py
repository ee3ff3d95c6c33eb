"""`recsys audit`: whether everything that was accepted is accounted for, and whether the state is what the log makes."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from recsys import config
from recsys.clock import SystemClock
from recsys.errors import BadInput
from recsys.streams.open import open_log
from services.cli.main import DONE, MISSED, emit
from services.cli.replay import progress_bar


def run(options: argparse.Namespace) -> int:
    """Exit code 1 when a sum does not close or a re-run is not equal."""
    loaded = config.load(options.config)
    if not (loaded.data_dir / "trainer").is_dir():
        raise BadInput(f"{loaded.data_dir / 'trainer'} does not exist: no trainer ever ran with this data_dir")
    if options.replay:
        result = _rerun(loaded)
        text = _said(result)
    emit(options, result, text)
    return DONE if result["ok"] else MISSED


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
