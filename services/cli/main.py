"""`recsys`: the entry point of everything.

Exit codes: 0 done, 1 goal missed, 2 bad input. With --json, stdout holds one JSON object and everything else is on stderr.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recsys import config, provenance
from recsys.errors import (
    BadInput,
    ConfigError,
    FolderLocked,
    LogTruncated,
    RecsysError,
    SchemaMismatch,
    SnapshotCorrupt,
    masked,
)
from recsys.files import for_owner_alone

DONE, MISSED, BAD = 0, 1, 2
_BAD_INPUT = (BadInput, ConfigError, FolderLocked, LogTruncated, SchemaMismatch, SnapshotCorrupt)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if wrong := [word for word in words if not word.isascii() and any("\ud800" <= char <= "\udfff" for char in word)]:
        parser().error(f"argument {wrong[0][:99]!r} is not UTF-8: write it again, or rename the file")
    options = parser().parse_args(words)
    config.one_thread_each()
    for_owner_alone()
    try:
        return int(options.run(options))
    except _BAD_INPUT as error:
        return fail(options, str(error), BAD)
    except RecsysError as error:
        return fail(options, str(error), MISSED)
    except KeyboardInterrupt:
        return fail(options, "interrupted", 130)
    except BrokenPipeError:
        return MISSED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            end, code = "nothing committed is lost: free space, then start again", MISSED
        elif error.filename is not None:  # whatever a path is or is not, it was given
            end, code = "check the path", BAD
        else:
            raise
        return fail(options, f"{error.filename or 'a file'}: {error.strerror}; {end}", code)


def fail(options: argparse.Namespace, message: str, code: int) -> int:
    """Say what went wrong, on stderr, and in JSON where it was asked for."""
    message = masked(message)
    print(f"recsys: {message}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"ok": False, "why": message}))
    return code


def emit(options: argparse.Namespace, value: dict[str, Any], text: str = "") -> None:
    """The command's result: JSON alone on stdout, or a text."""
    print(json.dumps(value) if options.json else text or json.dumps(value, indent=2))


def parser() -> argparse.ArgumentParser:
    """Every command with its help and an example."""
    root = argparse.ArgumentParser(
        prog="recsys",
        description="A recommender that learns from what a user did a moment ago.",
        epilog="Start with: recsys demo",
    )
    root.add_argument("--version", action="version", version=f"recsys {provenance.release()}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _service_commands(commands)
    _checkpoint_commands(commands)
    _data_commands(commands)
    _offline_commands(commands)
    _evaluate_commands(commands)
    return root


def _command(
    commands: Any, name: str, run: Any, summary: str, example: str, *, config_file: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    if config_file:
        command.add_argument("--config", type=Path, metavar="FILE", help="configuration (TOML); default: embedded mode")
    return command


def _of(module: str) -> Callable[[argparse.Namespace], int]:
    """The command of a module beside this one, which is loaded when it runs: `--help` loads none."""

    def run(options: argparse.Namespace) -> int:
        return int(importlib.import_module(f"services.cli.{module}").run(options))

    return run


def _service_commands(commands: Any) -> None:
    demo = _command(
        commands, "demo", _of("demo"), "see it learn: three clicks, another list", "recsys demo", config_file=False
    )
    demo.add_argument(
        "--exit", action="store_true", help="stop the services at the end instead of leaving them running"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the generated catalogue and users")
    demo.add_argument("--data-dir", type=Path, help="folder to use; default: a temporary one")
    up = _command(
        commands,
        "up",
        _of("run_up"),
        "start ranking, trainer and parameter",
        "recsys up --config deploy/configs/kafka.toml",
    )
    serve = _command(
        commands, "serve", _serve, "run one service in the foreground", "recsys serve ranking --config my.toml"
    )
    serve.add_argument("service", choices=("ranking", "parameter", "trainer"))
    for command in (up, serve):
        command.add_argument(
            "--accept-gap",
            action="store_true",
            help="go on although the log was made anew, or lost records that a saved position points at",
        )
    _operator_commands(commands)


def _operator_commands(commands: Any) -> None:
    show = commands.add_parser("config", help="show or check a configuration").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(
        show, "show", _config_show, "print the whole configuration with defaults", "recsys config show --config my.toml"
    )
    _command(
        show,
        "check",
        _of("config_check"),
        "say whether a configuration is valid",
        "recsys config check --config my.toml",
    )
    trainer = commands.add_parser("trainer", help="operate the trainer").add_subparsers(required=True, metavar="ACTION")
    resume = _command(trainer, "resume", _resume, "go on after the breaker opened", "recsys trainer resume --skip")
    how = resume.add_mutually_exclusive_group(required=True)
    how.add_argument("--learn", action="store_true", help="the feedback is right: learn from what waited")
    how.add_argument("--skip", action="store_true", help="the feedback was broken: go on after it without learning")

    audit = _command(
        commands,
        "audit",
        _of("audit"),
        "is everything that was accepted accounted for; --replay: is the state what the log makes",
        "recsys audit --replay --json",
    )
    audit.add_argument("--replay", action="store_true", help="run log and journal again, and compare bit by bit")
    table = commands.add_parser("table", help="the embedding table").add_subparsers(required=True, metavar="ACTION")
    inspect = _command(
        table,
        "inspect",
        _of("table"),
        "rows, load, bytes, rows by slot and age of a checkpoint or snapshot",
        "recsys table inspect recsys-data/trainer --json",
    )
    inspect.add_argument("snapshot", type=Path, help="folder with a manifest.json, or that file")


def _checkpoint_commands(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="the trainer's checkpoints").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(
        checkpoint,
        "list",
        _of("checkpoint_command"),
        "what `recsys rollback` can go back to",
        "recsys checkpoint list --config my.toml",
    )
    rollback = _command(
        commands,
        "rollback",
        _of("rollback_command"),
        "let trainer and serving go back to a checkpoint",
        "recsys rollback --to 81234 --skip",
    )
    rollback.add_argument("--to", type=int, required=True, metavar="ID", help="of `recsys checkpoint list`")
    after = rollback.add_mutually_exclusive_group(required=True)
    after.add_argument("--learn", action="store_true", help="learn again what came after it")
    after.add_argument("--skip", action="store_true", help="leave out what came after it, up to now")
    what, example = "carry what was learned over to another configuration", "recsys checkpoint migrate --dry-run"
    migrate = _command(checkpoint, "migrate", _of("migrate"), what, example)
    migrate.add_argument("--dry-run", action="store_true", help="say what would be kept, dropped and begun anew")


def _data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="convert public data sets").add_subparsers(required=True, metavar="ACTION")
    convert = _command(
        data,
        "convert",
        _of("convert_command"),
        "data set to event files",
        "recsys data convert globo clicks.parquet globo/",
        config_file=False,
    )
    convert.add_argument("kind", choices=("kuairand", "globo", "movielens"))
    convert.add_argument("source", type=Path, help="folder (kuairand, movielens) or file (globo)")
    convert.add_argument("out", type=Path, help="folder to write items, impressions and feedback to")
    convert.add_argument("--jsonl", action="store_true", help="write JSON lines instead of Parquet")
    send = _command(
        commands,
        "send",
        _of("send"),
        "play event files against running services",
        "recsys send --events globo/ --rate 200",
    )
    send.add_argument("--events", type=Path, nargs="+", required=True, help="event files, or their folder")
    send.add_argument("--rate", type=float, default=100.0, help="feedback events per second")
    send.add_argument(
        "--requests",
        choices=("all", "first", "none"),
        default="all",
        help="ask for a list before each click, once a session, never",
    )
    send.add_argument("--to", choices=("http", "kafka"), default="http", help="where the feedback goes")
    send.add_argument("--limit", type=int, help="stop after this many feedback events")
    send.add_argument("--url", help="ranking service; default: from the configuration")
    send.add_argument("--name", help="beginning of the event ids; the same again sends duplicates; default: the time")
    log = commands.add_parser("log", help="the event log").add_subparsers(required=True, metavar="ACTION")
    export = _command(log, "export", _of("export"), "a running system's log to event files", "recsys log export out/")
    export.add_argument("out", type=Path)
    export.add_argument("--from", dest="from_time", help="ISO time of the first record")
    export.add_argument("--to", dest="to_time", help="ISO time after the last record")
    load = _command(
        commands,
        "import",
        _of("import_command"),
        "load items or events once, with an outcome per row",
        "recsys import items items.jsonl",
    )
    load.add_argument("kind", choices=("items", "events"))
    load.add_argument("file", type=Path)
    load.add_argument("--url", help="ranking service; default: from the configuration")
    load.add_argument("--outcomes", type=Path, help="file of one outcome a row; default: FILE.outcomes.jsonl")


def _offline_commands(commands: Any) -> None:
    replay = _command(
        commands,
        "replay",
        _of("replay_command"),
        "run the whole loop over event files, offline",
        "recsys replay --events globo/ --json",
    )
    _replay_options(replay)
    replay.add_argument("--predictions", type=Path, metavar="FILE", help="write each scored example (Parquet)")
    experiment = commands.add_parser("experiment", help="many replays").add_subparsers(required=True, metavar="ACTION")
    several = _command(
        experiment,
        "run",
        _of("experiment"),
        "run a list of replays in the background, those that have no result yet",
        "recsys experiment run ablation.toml",
        config_file=False,
    )
    several.add_argument(
        "file", type=Path, help="TOML: out, [defaults], and [[runs]] with a name, options of replay, set"
    )
    several.add_argument("--wait", action="store_true", help="run them here, and end with the last")


def _replay_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--events", type=Path, nargs="+", required=True, help="event files, or their folder")
    command.add_argument("--report-from", help="ISO time; metrics count from here on")
    command.add_argument("--until", help="ISO time; events from here on are left out")
    command.add_argument("--tasks", help="names, comma-separated: predict and learn these alone")
    command.add_argument("--label-delay", type=float, help="seconds until a label is final, whatever window_s says")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the configuration, such as model.dim=8; may be repeated",
    )
    command.add_argument("--seed", type=int, help="in place of the configuration's")
    command.add_argument("--threads", type=int, default=1, help="torch threads; one sums in a fixed order")
    command.add_argument("--delay", type=float, default=0.0, help="seconds that weights and others' counters are old")
    command.add_argument(
        "--sync-interval",
        type=float,
        default=0.0,
        help="scoring sees them as at the last multiple of this many seconds",
    )
    command.add_argument("--freeze-user", action="store_true", help="the user's own history and counters, too")
    command.add_argument("--sample", type=float, default=1.0, help="share of requests answered and scored")


def _evaluate_commands(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="what else a log tells").add_subparsers(
        required=True, metavar="ACTION"
    )
    policy = _command(
        evaluate,
        "policy",
        _of("evaluate"),
        "what another policy would have earned where the log drew at random",
        "recsys evaluate policy --log out/ --policy greedy.toml --json",
        config_file=False,
    )
    policy.add_argument(
        "--log", type=Path, nargs="+", required=True, help="event files, their folder, or Open Bandit CSV"
    )
    policy.add_argument("--policy", type=Path, required=True, metavar="FILE", help="TOML or JSON: docs/evaluation.md")
    policy.add_argument(
        "--estimators",
        default="all",
        help="all that are valid, slates (every position drawn), or names, comma-separated: ips, snips, dm, dr, sndr, "
        "switch_dr, dr_os, replay, slate_ips, independent_ips, cascade_ips, cascade_dr",
    )
    policy.add_argument("--position", type=int, help="the drawn position; default: the one there is")
    policy.add_argument("--reward", default="click", help="feedback types that earn 1, comma-separated")
    policy.add_argument("--window", type=float, help="seconds in which feedback counts; default: until the log's end")
    policy.add_argument("--clip", type=float, help="cut weights of ips, snips, dr, sndr to this; default: not")
    policy.add_argument("--switch", type=float, default=10.0, help="switch_dr: larger weights trust the model alone")
    policy.add_argument("--shrink", type=float, default=10.0, help="dr_os: the smaller, the more weights shrink")
    policy.add_argument("--folds", type=int, default=2, help="of users, for the reward model")
    policy.add_argument("--prior", type=float, default=50.0, help="rounds that draw an item's mean to that of all")
    policy.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    policy.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    policy.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    compare = _command(
        evaluate,
        "compare",
        _of("compare_command"),
        "two configurations over the same events: paired differences, and their answers interleaved",
        "recsys evaluate compare old.toml new.toml --events globo/ --expect better",
        config_file=False,
    )
    compare.add_argument("first", type=Path, metavar="A", help="configuration (TOML)")
    compare.add_argument("second", type=Path, metavar="B", help="the other one")
    _replay_options(compare)
    compare.add_argument("--metric", help="what decides, such as mrr_at_20 or click.auc; default: hit rate, or AUC")
    compare.add_argument("--expect", choices=("better", "not_worse"), help="of B; exit code 1 when it is not so")


def _serve(options: argparse.Namespace) -> int:
    from services.common.process import STOP_S, Stop, setup_logging

    loaded = config.load(options.config)
    setup_logging(options.service)
    stop = Stop().install(STOP_S)
    try:
        importlib.import_module(f"services.{options.service}.main").run(loaded, stop, accept_gap=options.accept_gap)
    except FolderLocked as error:  # whoever holds it may be ending: no mistake, a supervisor tries again
        return fail(options, str(error), MISSED)
    return DONE


def _config_show(options: argparse.Namespace) -> int:
    shown = config.load(options.config).model_dump(mode="json")
    shown["state"]["url"] = masked(shown["state"]["url"])
    emit(options, shown)
    return DONE


def _resume(options: argparse.Namespace) -> int:
    from recsys.training import commands
    from services.cli.checkpoint_command import folder_of

    commands.leave(
        folder_of(config.load(options.config)), commands.RESUME, commands.SKIP if options.skip else commands.LEARN
    )
    emit(options, {"ok": True}, "the trainer goes on within a second, or when it is started")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
