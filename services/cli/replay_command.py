"""`recsys replay`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys import config
from recsys.clock import iso_ms
from recsys.errors import BadInput
from recsys.evaluation.impression_log import ImpressionLog
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Options
from recsys.events import event_files
from services.cli.main import DONE, emit
from services.cli.progress import progress_bar

MOST_S, MOST_THREADS = 1e9, 1024
"""Thirty years, and more cores than a machine has."""
SCORED = pa.schema(
    [
        ("task", pa.string()),
        ("prediction", pa.float64()),
        ("label", pa.bool_()),
        ("user", pa.int64()),
        ("day", pa.int32()),
    ]
)
"""A scored example: `user` is the user's key, `day` the day since the first impression. A task's rows come in time order."""


def options_of(arguments: argparse.Namespace, *, click_log: bool) -> Options:
    """Checked replay options."""
    if not 0 < arguments.sample <= 1:
        raise BadInput(f"--sample {arguments.sample} must be above 0 and at most 1", field="sample")
    for name in ("delay", "sync_interval", "label_delay"):
        if getattr(arguments, name) is not None and not 0 <= getattr(arguments, name) <= MOST_S:
            raise BadInput(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} must be from 0 to {MOST_S:g} seconds",
                field=name,
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


def prepared(
    arguments: argparse.Namespace, seen: dict[tuple[Path, ...], event_files.Names]
) -> tuple[config.Config, Options]:
    """Configuration and options, once they, every row of the events and the names in both are checked; what was read is in `seen`."""
    set_threads(arguments)
    loaded = config_of(arguments)
    options = options_of(arguments, click_log=not event_files.count_rows(arguments.events)["impression"])
    if options.click_log and getattr(arguments, "predictions", None):
        raise BadInput("--predictions: events without impressions have no examples to score", field="predictions")
    events = tuple(arguments.events)
    if events not in seen:
        with progress_bar("check") as progress:
            seen[events] = event_files.names_in(events, progress)
    _check_names(arguments, loaded, seen[events])
    return loaded, options


def _check_names(arguments: argparse.Namespace, loaded: config.Config, found: event_files.Names) -> None:
    """Refuse attributes and context fields, and lists of feedback types, that the configuration itself chooses and of which
    nothing would ever be learned. One type of several may be absent: a cut of a log need not have the rare ones."""
    features = loaded.features
    for option, wanted, known, enough in (
        ("catalogue.attributes", loaded.catalogue.attributes, found.attributes, all),
        ("features.context", features.context, found.context, all),
        ("features.numbers", features.numbers, found.attributes | set(features.context), all),
        ("features.time_since", features.time_since, found.attributes | {"last_event"}, all),
        ("features.history_types", features.history_types, found.types, any),
        ("features.elsewhere_types", features.elsewhere_types, found.types, any),
        ("retrieval.count_types", loaded.retrieval.count_types, found.types, any),
        *((f"tasks.{task.name}.types", task.types, found.types, any) for task in loaded.tasks),
    ):
        if not wanted or enough(name in known for name in wanted) or not _chosen(arguments, option):
            continue
        missing = next(name for name in wanted if name not in known)
        near = difflib.get_close_matches(missing, sorted(known), n=1, cutoff=0.0)
        instead = f"did you mean {near[0]!r}? Else take it out" if near else "take it out"
        where = ", ".join(map(str, arguments.events))
        raise BadInput(
            f"{arguments.config or 'the configuration'}: {option} names {missing!r}, but {where} has {sorted(known)}: "
            f"{instead}, or choose other events",
            field=missing,
        )


def _chosen(arguments: argparse.Namespace, option: str) -> bool:
    """Whether file, environment or command line sets this option; else it is a default."""
    changed = [setting.partition("=")[0] for setting in arguments.set] + ["tasks"] * bool(arguments.tasks)
    if any(f"{option}.".startswith(f"{key}.") for key in changed):
        return True
    given = config.load(arguments.config)
    section, name, *_ = option.split(".")
    return section in given.model_fields_set and (
        section == "tasks" or name in getattr(given, section).model_fields_set
    )


def set_threads(arguments: argparse.Namespace) -> None:
    """Torch threads of this process."""
    if not 1 <= arguments.threads <= MOST_THREADS:
        raise BadInput(f"--threads {arguments.threads} must be from 1 to {MOST_THREADS}", field="threads")
    torch.set_num_threads(arguments.threads)


def run(arguments: argparse.Namespace) -> int:
    """Replay with progress on stderr; the report on stdout."""
    loaded, chosen = prepared(arguments, {})
    events, wanted = event_files.merged(arguments.events), arguments.predictions
    sink: contextlib.AbstractContextManager[pq.ParquetWriter | None] = (
        _sink(wanted) if wanted else contextlib.nullcontext()
    )
    with sink as scored:
        with tempfile.TemporaryDirectory() as folder, progress_bar("replay") as progress:
            replay = Replay(loaded, chosen, Path(folder))
            result = replay.run(events, progress)
        emit(arguments, result)  # before what a full disk may refuse
        if scored is not None:
            assert isinstance(replay.driver, ImpressionLog)
            for task in replay.loop.schema.tasks:
                rows = replay.driver.progressive.rows(task)
                columns = [pa.array([task] * len(rows)), *(pa.array(rows[name]) for name in SCORED.names[1:])]
                scored.write_table(pa.table(columns, schema=SCORED))
    return DONE


def _sink(path: Path) -> pq.ParquetWriter:
    """The file of scored examples, opened before any hour is spent."""
    try:
        return pq.ParquetWriter(path, SCORED)
    except OSError as error:
        raise BadInput(f"--predictions {str(path)!r} cannot be written: {error}", field="predictions") from None
