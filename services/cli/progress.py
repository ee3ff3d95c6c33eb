"""Progress of long commands, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(name: str, every_s: float = 30.0, unit: str = "events") -> Iterator[Callable[[int, int], None]]:
    """On stderr, while it is open: called with how many there were and the log time. Off a terminal, a line every `every_s`."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, said = bar.add_task(name), time.monotonic()

        def progress(count: int, now_ms: int) -> None:
            nonlocal said
            when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="minutes")
            text = f"{name}: {count:,} {unit}, at {when}"
            bar.update(task, description=text)
            if not console.is_terminal and time.monotonic() - said >= every_s:
                print(text, file=sys.stderr, flush=True)
                said = time.monotonic()

        yield progress
