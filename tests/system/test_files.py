"""Every file of a data folder, flipped in every section and cut at every 4 KiB: what is read is what was written, or less of it,
said aloud; never something else. What a service then makes of it: `test_kept_files`, `test_parameter_service`, `test_supervisor`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from recsys.candidates.sources import Sources
from recsys.clock import SystemClock
from recsys.config import Config
from recsys.errors import LogTruncated, SnapshotCorrupt, StateUnavailable
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.files import COPY, KeptManifests, Manifests, read_file
from recsys.ranking import catalogue_file
from recsys.state.sqlite_state import SqliteState
from recsys.streams.sqlite_log import SqliteLog
from recsys.table.segments import read_segment
from recsys.training.journal import Journal
from recsys.training.spill import Place, Spill
from recsys.types import HistoryEvent
from tests.system.crash_matrix import Crashed

pytestmark = pytest.mark.system
CHECKED = ("small-", "dense-", "segment-", "snapshot-", "counters-", "recent_users-")
"""Named in a manifest, unless a crash came before that; `counters.json` is no such name."""
PAGE = 4096
CUTS, FLIPS = 40, 60
"""Of one file at most, spread over it; every 4 KiB of a file of 160 KB."""
NOTHING_READ = (
    "*.lock",
    "*-shm",
    "trainer/epoch-*",
    "trainer/restarting",
    "ranking/generations/*",
    "parameter/memory.json",
    "parameter/tables-*.memory",
    "*.tmp",
    "*.new",
    "*.bad",
)
"""Names that say all, what one run alone uses, and what a crash left of a file that has its final name later."""


def spread(places: list[int], most: int) -> list[int]:
    return places if len(places) <= most else [places[n * len(places) // most] for n in range(most)]


def sections(path: Path, data: bytes) -> list[int]:
    """Bytes in each part: head, every tensor of safetensors, every page of SQLite, every field of JSON, tail."""
    found = {0, 1, 7, 8, 9, 20, len(data) // 2, *range(len(data) - 12, len(data))}
    if path.name.endswith((".safetensors", ".dense", COPY)):
        size = int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                found |= {8 + size + begin, 8 + size + (begin + end) // 2}
    elif ".db" in path.name:
        found |= {page + at for page in range(0, len(data), 8192) for at in (0, 5, 60, 4000, 8100)}
    else:
        found |= set(range(0, len(data), max(1, len(data) // FLIPS)))
    return [place for place in sorted(found) if 0 <= place < len(data)]


def damages(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    for at in spread(list(range(0, len(data), PAGE)), CUTS):
        yield f"cut at {at}", data[:at]
    few = 4 if path.suffix == ".jsonl" else FLIPS  # putting one byte of a journal right takes a moment
    for at in spread(sections(path, data), few):
        yield f"flipped at {at}", data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


# What each kind of file is read as: a value, or an exception that says that it is damaged.

Read = Callable[[Path, Config], Any]


_entries: dict[str, dict[str, Any]] = {}
"""How manifests name each file."""


def note_entries(data: Path) -> None:
    def named(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "checksum" in value and "name" in value:
                yield value
            value = list(value.values())
        for each in value if isinstance(value, list) else ():
            yield from named(each)

    for path in data.rglob("*.json"):
        if not path.name.startswith("small-"):
            _entries.update({entry["name"]: entry for entry in named(orjson.loads(path.read_bytes()))})


def entry_of(path: Path) -> dict[str, Any] | None:
    return _entries.get(path.name.removesuffix(COPY))


def checked(path: Path, loaded: Config) -> Any:
    return read_file(path, _entries[path.name]["checksum"])


def segment(path: Path, loaded: Config) -> Any:
    """Of both files of one name: the copy is there for the other."""
    original = path.with_name(path.name.removesuffix(COPY))
    read_segment(original, _entries[original.name]["checksum"])
    return original.read_bytes()


def manifest(path: Path, loaded: Config) -> Any:
    """Both of its name."""
    name = path.name.removesuffix(".json").removesuffix(".previous")
    return unsealed(Manifests(path.parent, name).look())


def unsealed(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without a seal whose own name is what was flipped: the rest is as it was."""

    def is_seal(name: str) -> bool:
        return len(name) == 3 and sum(a != b for a, b in zip(name, "crc", strict=True)) == 1

    return [{k: v for k, v in fields.items() if not is_seal(k)} for fields in found]


def older(path: Path, loaded: Config) -> Any:
    """Checkpoints that one can go back to."""
    return unsealed(KeptManifests(path.parents[1]).manifests())


def journal(path: Path, loaded: Config) -> Any:
    first = min(int(each.stem.removeprefix("journal-")) for each in path.parent.glob("journal-*.jsonl"))
    return [astuple(entry) for entry in Journal(path.parent).entries(first)]


def columns(path: Path, loaded: Config) -> Any:
    schema = Schema.of(loaded)
    sources = Sources(loaded, schema, Catalogue(schema))
    bounds = {0: (0, 2**40)}
    found = catalogue_file.load(path.parent, sources, schema, bounds, SystemClock().now_ms())
    return [sources.catalogue.item(row) for row in range(len(sources.catalogue))] if found else []


def features(path: Path, loaded: Config) -> Any:
    """Of each open impression of the newest checkpoint."""
    trainer = path.parents[1]
    newest = next(iter(Manifests(trainer).look()))["small"]["name"]
    joiner = orjson.loads((trainer / newest).read_bytes())["trainer"]["joiner"]
    places = [Place(*opened[5]) for opened in joiner["open"]]
    spill, found = Spill(path.parent), []
    spill.restore(joiner["spill"], places, None)
    for place in places:
        with contextlib.suppress(SnapshotCorrupt):
            found.append((place, spill.read(place)))
    spill.close()
    return found


_identities: dict[str, str] = {}
_begins: dict[str, int] = {}
"""Of each topic, as it was first read: what was dropped before is there again in a file without its write-ahead log."""


def log(path: Path, loaded: Config) -> Any:
    topic = path.name.split(".")[0]
    opened, found = SqliteLog(path.parent, clock=SystemClock()), list[Any]()
    try:
        if opened.identity(topic, 0) != _identities.setdefault(topic, opened.identity(topic, 0)):
            raise SnapshotCorrupt("it is another log: every position in the old one is a gap, which its reader says")
        end = opened.end(topic, 0)
        offset = max(opened.begin(topic, 0), _begins.setdefault(topic, opened.begin(topic, 0)))
        while offset < end:
            batch = opened.read(topic, 0, offset)
            found += [(r.offset, r.key, r.value, r.time_ms) for r in batch]
            offset = batch.next
    finally:
        opened.close()
    return found


def state(path: Path, loaded: Config) -> Any:
    """Events and seen items; of a torn write-ahead log, with positions of before: the log gives the rest again."""
    store = SqliteState(path.parent / "state.db", 50, 500)
    try:
        users = [(n, store.get(f"user-{n}")) for n in range(60)]
    finally:
        store.close()
    return [(n, event) for n, user in users for event in user.history] + [
        (n, i) for n, user in users for i in user.seen
    ]


REFUSED = (SnapshotCorrupt, StateUnavailable, LogTruncated)
"""The last: a log that lost its first records, for a reader that stood there."""


class Kind(NamedTuple):
    read: Read
    whole: bool = False
    """All of it or nothing."""
    aloud: bool = True
    """What is missing is said; a tail that was torn off a journal, and what was not yet in a database's file, never was there."""


KINDS = {
    "trainer/kept/*.json": Kind(older, aloud=False),
    "trainer/manifest*.json": Kind(manifest, aloud=False),
    "parameter/manifest*.json": Kind(manifest, aloud=False),
    "ranking/*.json": Kind(manifest, aloud=False),
    "trainer/small-*.json": Kind(checked, whole=True),
    "trainer/dense-*": Kind(checked, whole=True),
    "parameter/*.dense": Kind(checked, whole=True),
    "ranking/counters-*": Kind(checked, whole=True),
    "ranking/recent_users-*": Kind(checked, whole=True),
    "ranking/catalogue-*": Kind(columns),
    "trainer/segment-*": Kind(segment, whole=True),
    "parameter/snapshot-*": Kind(segment, whole=True),
    "trainer/journal-*.jsonl": Kind(journal, aloud=False),
    "trainer/open/*.features": Kind(features, aloud=False),
    "log/*.db": Kind(log),
    "log/*.db-wal": Kind(log, aloud=False),
    "state.db": Kind(state, aloud=False),
    "state.db-wal": Kind(state, aloud=False),
}


def kind_of(path: Path, data: Path) -> str:
    name = path.relative_to(data).as_posix()
    return next((kind for kind in KINDS if fnmatch(name, kind)), "")


def files(data: Path) -> list[Path]:
    """Whatever is read by a process after the one that wrote it."""
    found = (path for path in sorted(data.rglob("*")) if path.is_file())
    read = [path for path in found if not any(fnmatch(path.relative_to(data).as_posix(), n) for n in NOTHING_READ)]
    return [path for path in read if not path.name.startswith(CHECKED) or entry_of(path)]


def beside(path: Path) -> list[Path]:
    """What it is read with."""
    first = path.name.split(".")[0]
    if path.suffix == ".features":
        return [*path.parents[1].glob("*.json"), *path.parent.iterdir()]
    if ".db" in path.name:
        return [p for p in path.parent.glob(f"{first}.*") if p.is_file()]
    if path.suffix == ".jsonl":
        return list(path.parent.glob("journal-*"))
    return [*path.parent.glob("*.json"), *path.parent.glob(f"{first}*")]


def test_every_file_has_a_kind(crashed: Crashed) -> None:
    kept = crashed.data
    note_entries(kept)
    kinds = [kind_of(path, kept) for path in files(kept)]
    assert all(kinds), files(kept)[kinds.index("")]
    assert set(kinds) >= KINDS.keys() - {"log/*.db-wal", "state.db-wal"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_back_what_was_written_or_says_so(
    kind: str, crashed: Crashed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, loaded = crashed.data, crashed.loaded
    note_entries(kept)
    paths = [path for path in files(kept) if kind_of(path, kept) == kind and path.stat().st_size]
    for number, path in enumerate([paths[0], paths[-1]] if len(paths) > 2 and "log/" not in kind else paths):
        work = tmp_path / str(number) / path.relative_to(kept)

        def renew(path: Path = path, work: Path = work) -> None:
            """Readers mend and set aside: each damage meets the folder as it was."""
            shutil.rmtree(tmp_path)
            for file in beside(path):
                target = work.parent / os.path.relpath(file, path.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)

        renew()
        expected = KINDS[kind].read(work, loaded)
        assert expected, path
        for how, damaged in damages(path, path.read_bytes()):
            renew()
            work.write_bytes(damaged)
            caplog.clear()
            with contextlib.suppress(*REFUSED):
                found = KINDS[kind].read(work, loaded)
                judge(KINDS[kind], expected, found, f"{path.name} {how}: {caplog.text[-300:]}")


def before(one: Any, expected: Any) -> bool:
    """Whether it is an event of a user from before all that are there: a history keeps the newest, an older file has others."""
    if not isinstance(one, tuple) or not isinstance(one[1], HistoryEvent):
        return False
    kept = [event.arrival for user, event in expected if user == one[0] and isinstance(event, HistoryEvent)]
    return bool(kept) and one[1].arrival < min(kept)


def judge(kind: Kind, expected: Any, found: Any, what: str) -> None:
    """What is read of a damaged file is all or some of what was written."""
    if found == expected:
        return
    assert not kind.whole, f"{what}: read as something else"
    made_up = [one for one in found or () if one not in expected and not before(one, expected)]
    assert not made_up, f"{what}: {str(made_up[0])[:300]} was never written"
    assert not kind.aloud or what.partition(": ")[2], f"{what}: nothing is said"
