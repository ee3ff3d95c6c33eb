"""`recsys replay`."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
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
    for name in ("delay", "sync_interval", "label_delay"):
        if getattr(arguments, name) is not None and not 0 <= getattr(arguments, name) < float("inf"):
            raise BadInput(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} must be 0 or more seconds", field=name
            )
    if 0 < arguments.sync_interval < 0.001:
        raise BadInput(
            f"--sync-interval {arguments.sync_interval} must be 0, or 0.001 seconds or more", field="sync_interval"
        )
    until_ms = iso_ms(arguments.until, "--until") or 2**62
    return Options(
        report_from_ms=iso_ms(arguments.report_from, "--report-from"),
        until_ms=until_ms,
        delay_s=arguments.delay,
        sync_interval_s=arguments.sync_interval,
        label_delay_s=arguments.label_delay,
        freeze_user=arguments.freeze_user,
        sample=arguments.sample,
        click_log=click_log,
    )


def config_of(arguments: argparse.Namespace) -> config.Config:
    """The configuration with what the command line changes."""
    loaded = config.load(arguments.config)
    for setting in arguments.set:
        loaded = _set(loaded, setting)
    raw = loaded.model_dump(mode="json")
    if arguments.seed is not None:
        raw["seed"] = arguments.seed
    if arguments.tasks:
        names, known = arguments.tasks.split(","), [task.name for task in loaded.tasks]
        if wrong := [name for name in names if name not in known]:
            raise BadInput(f"--tasks: {wrong[0]!r} is not one of {known}", field="tasks")
        raw["tasks"] = [task for task in raw["tasks"] if task["name"] in names]
    return config.parse(raw)


def _set(loaded: config.Config, setting: str) -> config.Config:
    """The configuration with `KEY=VALUE`; the value is JSON, or a string."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {setting!r} is not KEY=VALUE, such as model.dim=8", field="set")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    raw = loaded.model_dump(mode="json")
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise BadInput(f"--set {setting!r}: {section!r} is not a section", field="set")
    target[last] = value
    return config.parse(raw)


def check_fields(loaded: config.Config, events: list[Path]) -> None:
    """Refuse a configuration that itself names fields which the events do not have: nothing would ever be learned of them."""
    attributes, context = files.fields_of(events)
    for option, section, wanted, found in (
        ("catalogue.attributes", loaded.catalogue, loaded.catalogue.attributes, attributes),
        ("features.context", loaded.features, loaded.features.context, context),
    ):
        if option.split(".")[1] not in section.model_fields_set:
            continue
        if missing := [name for name in wanted if name not in found]:
            where = ", ".join(map(str, events))
            raise BadInput(
                f"{option} names {missing[0]!r}, but {where} has {sorted(found)}: take it out, or choose other events",
                field=missing[0],
            )


def set_threads(arguments: argparse.Namespace) -> None:
    """Torch threads of this process."""
    if arguments.threads < 1:
        raise BadInput(f"--threads {arguments.threads} must be 1 or more", field="threads")
    torch.set_num_threads(arguments.threads)


def run(arguments: argparse.Namespace) -> int:
    """Replay with progress on stderr; the report on stdout."""
    set_threads(arguments)
    loaded = config_of(arguments)
    check_fields(config.load(arguments.config), arguments.events)
    chosen = options_of(arguments, click_log=not files.count_rows(arguments.events)["impression"])
    events = files.merged(arguments.events)
    with tempfile.TemporaryDirectory() as folder, progress_bar("replay") as progress:
        result = Replay(loaded, chosen, Path(folder)).run(events, progress)
    emit(arguments, result)
    return DONE


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """On stderr, while it is open: called with the number of events and the event time."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name)

        def progress(count: int, now_ms: int) -> None:
            when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="minutes")
            bar.update(task, description=f"{name}: {count:,} events, at {when}")

        yield progress
