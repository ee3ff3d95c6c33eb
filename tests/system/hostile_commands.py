"""Commands of `recsys`, run in one process with wrong files and wrong words: what they answer, and what they must never do.

A command ends with exit code 0, 1 or 2 within a minute; says what is wrong in words and, with --json, in one JSON object;
raises nothing; an import has an outcome for each row. Files are of every format that a command reads: JSON lines, Parquet,
CSV, TOML, a table's manifest and segments, a data folder. Setup is made once: an input costs what its command costs, some
hundredths of a second.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from recsys.errors import RecsysError
from recsys.events.event_files import write_events
from services.cli.main import main as command_line
from tests.system.embedded import ROOT, wait_for
from tests.system.hostile_world import PLAIN, SMALL, convertible, toml, world
from tests.system.mutate import STRANGE, Mutator

GOLDEN = ROOT / "tests/golden/data-2026-11.tar.xz"
FOLDERS = ("now", "old")
LIMIT_S, WARM_S = 60.0, 600.0
"""A command of a handful of rows takes some hundredths of a second; the first replay compiles, beside other tests for minutes."""
TOLD = 500


class Hung(BaseException):
    """No handler of a command takes it for something else."""


class Commands:
    """Runs commands in a folder of its own and counts how they end; `said` has each message once."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.folder = folder / "a/b/c"  # what a changed path leads to lies inside, too
        self.folder.mkdir(parents=True)
        self.mutator, self.rng, self.url = Mutator(seed), random.Random(seed), url
        self.answers: Counter[str] = Counter(crashed=0)
        self.said: dict[str, str] = {}

    def __enter__(self) -> Commands:
        self._before = Path.cwd(), signal.signal(signal.SIGALRM, _hang)
        os.chdir(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        folder, handler = self._before
        os.chdir(folder)
        signal.signal(signal.SIGALRM, handler)

    def prepare(self, data: Path, config: str) -> None:
        """Valid files of every format: events, configurations, policies, data sets, a stopped system's folder and an old one."""
        write_events("lines", *world(), jsonl=True)
        write_events("parquet", *world())
        with tarfile.open(GOLDEN) as archive:
            archive.extractall("old", filter="data") if hasattr(tarfile, "data_filter") else archive.extractall("old")
        wait_for(lambda: _copied(data, Path("now/data")), "a copy of the data folder with a checkpoint", 30.0)
        for name in FOLDERS:
            Path(f"{name}.toml").write_text(f'data_dir = "{name}/data"\n{config if name == "now" else ""}')
        Path("small.toml").write_text(toml(SMALL))
        Path("plain.toml").write_text(toml(PLAIN))
        Path("wrong.toml").write_text("nothing = 1\n")
        Path("policy.toml").write_text(toml({"policy": "greedy"}))
        convertible(Path("sets"))
        self._prepared = {path.name for path in self.folder.iterdir()}
        code, _ = self.run("replay", "--config", "small.toml", "--events", "lines", limit_s=WARM_S)
        assert code == 0, "a replay of what is valid"
        self.answers.clear()

    def run(self, *words: str, limit_s: float = LIMIT_S) -> tuple[Any, dict[str, Any]]:
        """One command as `recsys` runs it: its exit code and its result."""
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = self._limited(lambda: command_line([*words, "--json"]), limit_s)
        result, why = _judged(code, out.getvalue(), said.getvalue())
        self._count(code, words, said.getvalue(), why)
        return code, result

    def tidy(self) -> None:
        """What commands made under any name is not read by others: a log that was exported is long."""
        for made in self.folder.iterdir():
            if made.name not in self._prepared:
                shutil.rmtree(made) if made.is_dir() else made.unlink()

    def read(self, reader: Callable[[], object], what: str) -> None:
        """The reader of a command whose work is too long for this: what `main` makes an exit code of is one here, too."""
        said = ""

        def code() -> int:
            nonlocal said
            try:
                reader()
            except (RecsysError, OSError) as error:
                said = str(error)
                return 2
            return 0

        done = self._limited(code, LIMIT_S)
        self._count(done, (what,), said, "" if done == 0 or (done == 2 and said) else "ended")

    def lost(self, what: str) -> None:
        """Something that a command took was nowhere afterwards."""
        self.answers["crashed"] += 1
        print(f"lost: {what}", file=sys.stderr)

    def _limited(self, work: Callable[[], int], limit_s: float) -> Any:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            return work()
        except SystemExit as ended:  # of the parser
            return ended.code
        except (Exception, Hung) as error:  # noqa: BLE001 - it is what is counted
            return f"raised {type(error).__name__}: {error}"[:TOLD]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _count(self, code: Any, words: Sequence[str], said: str, why: str) -> None:
        self.answers[f"exit {code}" if code in (0, 1, 2) else str(code).split(":")[0]] += 1
        if code not in (0, None):
            shape = "".join("#" if c.isdigit() else c for c in said[-TOLD:])[:60]
            self.said.setdefault(f"{words[:2]}{shape}", f"{words!r}\n    {said.strip()[-TOLD:]}")
        if why:
            self.answers["crashed"] += 1
            print(f"{why}: {code}: {words!r}: {said[-TOLD:]}", file=sys.stderr)


def _hang(*_: object) -> None:
    raise Hung("still running when its time was over")


def _judged(code: Any, out: str, said: str) -> tuple[dict[str, Any], str]:
    """The result, and what is wrong with how the command ended."""
    if code not in (0, 1, 2):
        return {}, "ended"
    if "Traceback" in said or (code == 2 and not said.strip()):
        return {}, "unsaid"
    if code == 2 and ": error: " in said and not out:
        return {}, ""  # of the parser
    try:
        result = orjson.loads(out)
    except orjson.JSONDecodeError:
        return {}, f"not one JSON object: {out[:200]!r}"
    goal = isinstance(result, dict) and False in (result.get("ok"), result.get("met"))
    return result, "" if code != 1 or goal or said.strip() else "unsaid"


def _copied(data: Path, out: Path) -> bool:
    """A running system's folder as after a power cut; not while files come and go."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        shutil.copytree(data, out, ignore=shutil.ignore_patterns("*.sock"))
    except shutil.Error:
        return False
    return all((out / service / "manifest.json").exists() for service in ("trainer", "parameter"))


def typed(commands: Commands, count: int) -> None:
    """Commands with some of their words changed, left out or doubled."""
    rng = commands.rng
    for number in range(count):
        words = [part.replace("URL", commands.url) for part in TYPED[number % len(TYPED)]]
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            values = [n for n in range(2, len(words)) if not words[n].startswith("--")]
            at = rng.choice(values) if values and rng.random() < 0.7 else rng.randrange(1, len(words) + 1) - 1
            way = rng.choice((0, 0, 0, 1, 2))
            words[at : at + 1] = [[_word(commands, words[at])], [], [words[at]] * 2][way] if at else words[:1]
        if words[0] in ("serve", "up") and words[-1] != "wrong.toml":
            words += ["--config", "wrong.toml"]
        commands.run(*words)
        commands.tidy()


def _word(commands: Commands, word: str) -> str:
    """Another word: of a number, a far one, too. Never an address elsewhere, and never a path out of the folder."""
    if "://" in word:
        return commands.rng.choice(URLS)
    if commands.rng.random() < 0.4:
        found = str(commands.rng.choice([v for v in STRANGE if not isinstance(v, dict | list)]))
    elif "=" in word and commands.rng.random() < 0.7:
        found = f"{word.partition('=')[0]}={json.dumps(commands.rng.choice(STRANGE))}"
    else:
        found = commands.mutator.any(word.encode(errors="surrogateescape"))[:5000].decode(errors="surrogateescape")
    return found.replace("\0", "").lstrip("/")


URLS = (
    *(
        "",
        "http",
        "http://",
        "ftp://127.0.0.1",
        "127.0.0.1:9",
        "http://127.0.0.1:9",
        "http://127.0.0.1:x",
        "http://[::1",
    ),
    *("http://127.0.0.1:99999", "http://127.0.0.1:-1", "http:///v1", "http://127.0.0.1:9/v1?x=#y", "http://\ud800"),
)
KEPT = ("--config", "now.toml")
REPLAYED = ("replay", "--events", "lines", "--config", "plain.toml")
TYPED = (
    ("import", "items", "lines/items.jsonl", "--url", "URL", "--outcomes", "made.jsonl"),
    ("import", "events", "parquet/feedback.parquet", "--url", "URL", *KEPT),
    ("config", "check", *KEPT),
    ("config", "show", *KEPT),
    ("table", "inspect", "now/data/trainer", *KEPT),
    (*REPLAYED, "--report-from", "2017-10-03T03:00:00Z", "--until", "2027-10-03", "--tasks", "click"),
    (*REPLAYED, "--label-delay", "5", "--set", "model.dim=8", "--seed", "2", "--threads", "1"),
    (
        *REPLAYED,
        "--delay",
        "1.5",
        "--sync-interval",
        "2",
        "--freeze-user",
        "--sample",
        "0.5",
        "--predictions",
        "made.parquet",
    ),
    ("audit", *KEPT),
    ("checkpoint", "list", *KEPT),
    ("checkpoint", "migrate", "--dry-run", *KEPT),
    ("rollback", *KEPT, "--to", "297", "--skip"),
    ("trainer", "resume", *KEPT, "--skip"),
    ("log", "export", "made", *KEPT, "--from", "2026-11-28T07:00:00Z", "--to", "2026-12-01"),
    (
        "evaluate",
        "policy",
        "--log",
        "lines",
        "--policy",
        "policy.toml",
        "--clip",
        "1",
        "--position",
        "2",
        "--folds",
        "2",
    ),
    (
        *(
            "evaluate",
            "policy",
            "--log",
            "lines",
            "--policy",
            "policy.toml",
            "--confidence",
            ".9",
            "--resamples",
            "100",
        ),
        *("--seed", "1", "--reward", "click,like", "--window", "60", "--switch", "2", "--shrink", "3", "--prior", "9"),
    ),
    (
        "evaluate",
        "compare",
        "plain.toml",
        "plain.toml",
        "--events",
        "lines",
        "--set",
        "model.dim=4",
        "--expect",
        "better",
    ),
    ("data", "convert", "movielens", "sets/movielens", "made"),
    (
        "send",
        "--events",
        "lines",
        "--url",
        "URL",
        "--rate",
        "100000",
        "--limit",
        "5",
        "--requests",
        "none",
        "--name",
        "t",
    ),
    ("serve", "ranking", "--config", "wrong.toml"),
    ("up", "--config", "wrong.toml", "--accept-gap"),
    ("experiment", "run", "wrong.toml"),
)
"""`wrong.toml` is no configuration: none of the last three starts something."""
