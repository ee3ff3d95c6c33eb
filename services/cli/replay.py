"""`recsys replay`."""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from recsys import config
from recsys.errors import BadInput
from recsys.evaluation.replay import Options, Replay
from recsys.events import files
from services.cli.main import DONE, emit


def iso_ms(text: str | None, field: str) -> int:
    """An ISO time to milliseconds; 0 for none. Without a zone it is UTC."""
    if text is None:
        return 0
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(
            f"{field} {text!r} is not an ISO time: write it like 2017-10-03T03:00:00Z", field=field
        ) from None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return round(when.timestamp() * 1000)


def options_of(arguments: argparse.Namespace, *, click_log: bool) -> Options:
    """Checked replay options."""
    if not 0 < arguments.sample <= 1:
        raise BadInput(f"--sample {arguments.sample} must be above 0 and at most 1", field="sample")
    for name in ("delay", "sync_interval"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise BadInput(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} must be 0 or more seconds", field=name
            )
    return Options(
        report_from_ms=iso_ms(arguments.report_from, "--report-from"),
        delay_s=arguments.delay,
        sync_interval_s=arguments.sync_interval,
        freeze_user=arguments.freeze_user,
        sample=arguments.sample,
        click_log=click_log,
    )


def run(arguments: argparse.Namespace) -> int:
    """Replay with progress on stderr; the report on stdout."""
    torch.set_num_threads(1)
    loaded, chosen = (
        config.load(arguments.config),
        options_of(arguments, click_log=not files.count_rows(arguments.events)["impression"]),
    )
    events = files.merged(arguments.events)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("replay")

        def progress(count: int, now_ms: int) -> None:
            when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="minutes")
            bar.update(task, description=f"replay: {count:,} events, at {when}")

        result = Replay(loaded, chosen, Path(folder)).run(events, progress)
    emit(arguments, result)
    return DONE
