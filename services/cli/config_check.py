"""`recsys config check`: whether a configuration is valid, and what will score its requests."""

from __future__ import annotations

import argparse

from recsys import config
from recsys.model.scoring import lacking
from recsys.ranking.rules import RuleBook
from services.cli.main import DONE, emit


def run(options: argparse.Namespace) -> int:
    """Read the file as the services do."""
    loaded = config.load(options.config)
    RuleBook.of(loaded)  # reads what a configuration's filters say, too
    by = "torch" if lacking(loaded) else "compiled kernels"
    emit(options, {"ok": True, "scored_by": by}, f"the configuration is valid; requests are scored by {by}")
    return DONE
