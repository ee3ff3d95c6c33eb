"""`recsys experiment run`: a list of replays from a file, one after another, in the background; one result file a run."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.errors import BadInput, FolderLocked
from recsys.events import event_files
from recsys.files import write_file
from recsys.provenance import cpu_model, git, head
from services.cli.main import DONE, MISSED, emit, parser
from services.cli.replay_command import config_of, prepared

KEYS = {"name", "set", "group"}
"""Of a run, beside the options of `recsys replay`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One replay: its arguments, and where its result goes."""

    name: str
    arguments: tuple[str, ...]
    result: Path


def run(options: argparse.Namespace) -> int:
    """Check every run, and all events of those without a result; then start these, and wait for them with --wait."""
    runs, out = read(options.file)
    todo = [each for each in runs if not each.result.exists()]
    _check_events(todo, options.file)
    state = {"runs": len(runs), "done": len(runs) - len(todo), "results": str(out)}
    if todo and not options.wait:
        log = out / "experiment.log"
        command = [
            sys.executable,
            "-m",
            "services.cli.main",
            "experiment",
            "run",
            str(options.file.resolve()),
            "--wait",
        ]
        with log.open("ab") as stderr:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True
            )
        text = f"{len(todo)} of {len(runs)} runs started in the background (process {child.pid}); see {log}"
        emit(options, state | {"pid": child.pid, "log": str(log)}, text)
        return DONE
    failed = [each.name for each in _one_after_another(todo, out, options.file.resolve().parent)]
    state |= {"done": len(runs) - len(failed), "failed": failed}
    emit(
        options,
        state,
        f"{state['done']} of {len(runs)} runs have a result in {out}" + "".join(f"\nfailed: {n}" for n in failed),
    )
    return MISSED if failed else DONE


def read(path: Path) -> tuple[list[Run], Path]:
    """The runs of a file, checked as far as can be without running them, and the folder of their results.

    BadInput or ConfigError names run, key and remedy.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"experiment file {str(path)!r} does not exist: check its name") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise BadInput(f"experiment file {str(path)!r} cannot be read ({error}): mend it") from None
    if "\\u0000" in json.dumps(given, default=str):
        raise BadInput(f"{path}: a text holds a zero byte, which no file's name can: take it out")
    _known(given, {"out", "defaults", "groups", "runs"}, str(path))
    out = path.parent / str(given.get("out", "results"))
    listed = given.get("runs")
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
        raise BadInput(f"{path} lists no runs: write a [[runs]] table with a name for each")
    named, defaults = given.get("groups", {}), given.get("defaults", {})
    if wrong := [each for each in (named, defaults, *_values(named)) if not isinstance(each, dict)]:
        raise BadInput(
            f"{path}: [defaults] and [groups.NAME] must be tables of options, got {wrong[0]!r}: write tables"
        )
    groups = {"": {}} | named
    if unknown := [each["group"] for each in listed if each.get("group", "") not in groups]:
        raise BadInput(
            f"{path}: a run is of group {unknown[0]!r}: write a [groups.{unknown[0]}] table, or leave group out"
        )
    runs = [_run(defaults | groups[each.get("group", "")] | each, path, out) for each in listed]
    names = [each.name for each in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"{path} has two runs named {twice[0]!r}: each has a result file of its own")
    out.mkdir(parents=True, exist_ok=True)
    return runs, out


def _values(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, dict) else []


def _run(given: Mapping[str, Any], path: Path, out: Path) -> Run:
    name = given.get("name")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise BadInput(f"{path}: a run needs a name that can be a file's, got {name!r}")
    arguments = ["replay", "--json"]
    for key, value in given.items():
        if key in KEYS or value is False:
            continue
        listed = value if isinstance(value, list) else [] if value is True else [value]
        if key == "predictions":
            listed = [str(out / f"{name}.parquet" if value is True else path.parent / str(value))]
        if key in ("events", "config"):
            listed = [str(path.parent / str(each)) for each in listed]
            if missing := [each for each in listed if not Path(each).exists()]:
                raise BadInput(f"{path}, run {name!r}: {key} {missing[0]!r} does not exist")
        arguments += [f"--{key}", *map(str, listed)]
    settings = given.get("set", {})
    if not isinstance(settings, dict):
        raise BadInput(f"{path}, run {name!r}: set must be a table of options and values, got {settings!r}")
    for key, value in settings.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    each = Run(name=name, arguments=tuple(arguments), result=out / f"{name}.json")
    _check(each, given, path)
    return each


def _check(each: Run, given: Mapping[str, Any], path: Path) -> None:
    """That `recsys replay` would take the arguments and the configuration."""
    known = options_of_replay()
    _known(given, known | KEYS, f"{path}, run {each.name!r}")
    try:
        parsed = parser().parse_args(each.arguments)
    except SystemExit:
        raise BadInput(f"{path}, run {each.name!r}: `recsys {' '.join(each.arguments)}` is not a command") from None
    config_of(parsed)


def _check_events(todo: list[Run], path: Path) -> None:
    """That no run would refuse its events, each read once, or what its configuration names in them."""
    seen: dict[tuple[Path, ...], event_files.Names] = {}
    for each in todo:
        try:
            prepared(parser().parse_args(each.arguments), seen)
        except BadInput as error:
            raise BadInput(f"{path}, run {each.name!r}: {error}", field=error.field) from None


def options_of_replay() -> set[str]:
    """Names of its options, as a run may set them."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines), contextlib.suppress(SystemExit):
        parser().parse_args(["replay", "--help"])
    return set(re.findall(r"--([a-z-]+)", lines.getvalue())) - {"help", "json", "set"}


def _known(given: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.0)
            raise BadInput(f"{where}: {key!r} is not known; did you mean {near[0]!r}?")


def _circumstances(folder: Path, out: Path) -> dict[str, str | bool]:
    """What else a result depends on: the commit of the folder that holds the experiment (empty: none), whether files other
    than results differ from it, and the machine."""
    changed = [line[3:] for line in git(folder, "status", "--porcelain").splitlines()]
    top, results = Path(git(folder, "rev-parse", "--show-toplevel").strip()), out.resolve()
    return {
        "commit": head(folder),
        "dirty": not all((top / name).is_relative_to(results) for name in changed),
        "hardware": f"{os.cpu_count()} cores, {cpu_model()}",
    }


def _one_after_another(todo: list[Run], out: Path, folder: Path) -> Iterator[Run]:
    """Run them, and yield those that failed; `folder` holds the experiment."""
    lock = out / "experiment.pid"
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        holder = lock.read_text()
        if holder.isdigit() and Path(f"/proc/{holder}").exists():
            raise FolderLocked(f"process {holder} runs experiments into {out}: wait for it, or stop it") from None
        descriptor = os.open(lock, os.O_WRONLY | os.O_TRUNC)  # it was killed
    with os.fdopen(descriptor, "w") as file:
        file.write(str(os.getpid()))
    try:
        for number, each in enumerate(todo, 1):
            print(f"{number} of {len(todo)}: {each.name}", file=sys.stderr, flush=True)
            circumstances = _circumstances(folder, out)
            command = ["nice", sys.executable, "-m", "services.cli.main", *each.arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
            if done.returncode != 0:
                print(f"{each.name} failed with exit code {done.returncode}", file=sys.stderr, flush=True)
                yield each
                continue
            result = {
                "name": each.name,
                "arguments": each.arguments,
                **circumstances,
                **json.loads(done.stdout),
            }
            write_file(each.result, json.dumps(result, indent=1).encode() + b"\n")
    finally:
        lock.unlink(missing_ok=True)
