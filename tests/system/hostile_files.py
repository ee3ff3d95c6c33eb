"""Wrong files of every format into every command of `recsys` that reads them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from services.cli import experiment
from tests.system.hostile_commands import FOLDERS, Commands
from tests.system.hostile_world import CONFIG, toml
from tests.system.mutate import STRANGE


class Files:
    """Sends them; each format in turn."""

    def __init__(self, commands: Commands) -> None:
        self._to, self._mutator, self._rng = commands, commands.mutator, commands.rng

    def each(self, count: int) -> None:
        """So many inputs, each door of the file kinds in turn."""
        doors = [
            self._import_lines,
            self._import_parquet,
            self._import_state,
            self._config,
            self._table,
            self._events,
            self._policy,
            self._open_bandit,
            self._converted,
            self._experiment,
            self._data_folder,
        ]
        for number in range(count):
            doors[number % len(doors)](number // len(doors))

    def _import(self, kind: str, path: Path) -> None:
        code, result = self._to.run("import", kind, path.name, "--url", self._to.url)
        outcomes = path.with_name(f"{path.name}.outcomes.jsonl")
        if code in (0, 1) and "rows" in result and path.suffix == ".jsonl":
            content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
            lines = [number for number, line in enumerate(content, 1) if line.strip()]
            told = [orjson.loads(line)["row"] for line in outcomes.read_bytes().splitlines()]
            if told != lines:
                self._to.lost(f"rows {sorted(set(lines) ^ set(told))[:5]} of {content[:3]!r}")
        for made in (outcomes, path.with_name(f"{path.name}.import.json")):
            made.unlink(missing_ok=True)

    def _import_lines(self, number: int) -> None:
        kind, source = (("items", "items"), ("events", "feedback"))[number % 2]
        path = self._to.folder / f"{source}.jsonl"
        path.write_bytes(self._lines((self._to.folder / f"lines/{path.name}").read_bytes()))
        self._import(kind, path)

    def _import_parquet(self, number: int) -> None:
        kind, source = (("items", "items"), ("events", "feedback"))[number % 2]
        path = self._to.folder / f"{source}.parquet"
        path.write_bytes(self._parquet(self._to.folder / f"parquet/{path.name}"))
        self._import(kind, path)

    def _import_state(self, number: int) -> None:
        """How far an import is, as another program may have left it beside the rows."""
        path = self._to.folder / "begun.jsonl"
        shutil.copyfile(self._to.folder / "lines/items.jsonl", path)
        counts = {"accepted": 2, "duplicate": 0, "rejected": 0}
        state = {"kind": "items", "rows": 2, "position": 100, "outcomes_bytes": 5, "counts": counts}
        state |= {"digest": "", "system": ""}
        path.with_name(f"{path.name}.import.json").write_bytes(self._mutator.any(json.dumps(state).encode()))
        path.with_name(f"{path.name}.outcomes.jsonl").unlink(missing_ok=True)
        self._to.run("import", "items", path.name, "--url", self._to.url)

    def _config(self, number: int) -> None:
        path = self._to.folder / "changed.toml"
        path.write_bytes(self._toml(CONFIG))
        self._to.run("config", ("check", "show")[number % 2], "--config", path.name)

    def _table(self, number: int) -> None:
        """A manifest that says something else under its own seal, or bytes of a segment changed."""
        folder = self._to.folder / FOLDERS[number // 2 % 2] / "data" / ("trainer", "parameter")[number % 2]
        files = [folder / "manifest.json", *sorted(folder.glob("*.safetensors"))]
        path = self._rng.choice(files) if self._rng.random() < 0.5 else files[0]
        with self._changed(path):
            self._to.run("table", "inspect", str(folder.relative_to(self._to.folder)))

    def _events(self, number: int) -> None:
        """Replays: of what is still valid, the whole loop runs."""
        form = ("lines", "parquet")[number % 2]
        names = sorted(path.name for path in (self._to.folder / form).iterdir() if not path.name.startswith("."))
        path = self._to.folder / form / self._rng.choice(names)
        valid = path.read_bytes()
        path.write_bytes(self._lines(valid) if form == "lines" else self._parquet(path))
        words = (
            ("--config", "small.toml") if number % 10 else ("--config", "small.toml", "--predictions", "made.parquet")
        )
        send = ("send", "--url", self._to.url, "--rate", "100000", "--limit", "20", "--events", form)
        self._to.run(*(("replay", *words, "--events", form) if number % 3 else send))
        path.write_bytes(valid)

    def _policy(self, number: int) -> None:
        given = (
            {"policy": "fixed", "probabilities": {"a": 0.5, "b": 0.5, "d": 0.1}},
            {"policy": "softmax", "by": "score"},
        )
        path = self._to.folder / ("changed.toml", "changed.json")[number % 2]
        valid = given[number // 2 % 2] | ({} if number % 3 else {"temperature": 2.0})
        path.write_bytes(self._mutator.any(json.dumps(valid).encode()) if number % 2 else self._toml(valid))
        kind = ("all", "slates", "ips,snips,dr")[number % 3]
        self._to.run("evaluate", "policy", "--log", "lines", "--policy", path.name, "--estimators", kind)

    def _open_bandit(self, number: int) -> None:
        rows = [f"{n % 3},{n % 3 + 1},{n % 2},0.3333,{n / 9},0.1,0.2".split(",") for n in range(12)]
        rows.insert(
            0, ["item_id", "position", "click", "propensity_score"] + [f"user-item_affinity_{n}" for n in range(3)]
        )
        for _ in range(self._rng.randint(1, 3)):
            row = self._rng.choice(rows)
            row[self._rng.randrange(len(row))] = str(self._rng.choice(STRANGE))
        text = "\n".join(map(",".join, rows)).encode()
        path = self._to.folder / "rows.csv"
        path.write_bytes(text if number % 3 else self._mutator.any(text))
        self._to.run("evaluate", "policy", "--log", path.name, "--policy", "policy.toml")

    def _converted(self, number: int) -> None:
        kind = ("kuairand", "globo", "movielens")[number % 3]
        source = self._to.folder / "sets" / kind
        path = self._rng.choice(sorted(source.iterdir()))
        valid = path.read_bytes()
        path.write_bytes(self._parquet(path))
        named = source / "clicks.parquet" if kind == "globo" else source
        self._to.run("data", "convert", kind, str(named), "converted", *["--jsonl"] * (number % 2))
        path.write_bytes(valid)

    def _experiment(self, number: int) -> None:
        valid = {"out": "made", "runs": [{"name": "one", "events": "lines", "config": "small.toml", "sample": 0.5}]}
        path = self._to.folder / "changed.toml"
        path.write_bytes(self._toml(valid | {"defaults": {"seed": 1, "set": {"model.dim": 8}}, "groups": {"g": {}}}))
        self._to.read(lambda: experiment.read(path), "experiment run")

    def _data_folder(self, number: int) -> None:
        """One file of a stopped system's folder."""
        name = FOLDERS[number // 4 % 2]
        files = [p for p in sorted((self._to.folder / name).rglob("*")) if p.is_file() and p.suffix != ".log"]
        path = self._rng.choice([p for p in files if not p.name.endswith("-shm")])
        commands = (
            ("audit",),
            ("checkpoint", "list"),
            ("log", "export", "exported"),
            ("checkpoint", "migrate", "--dry-run"),
        )
        with self._changed(path):
            self._to.run(*commands[number % len(commands)], "--config", f"{name}.toml")

    @contextlib.contextmanager
    def _changed(self, path: Path) -> Iterator[None]:
        """A file of a data folder changed for now: JSON under a seal of its own, if it had one."""
        folder = self._to.folder / path.relative_to(self._to.folder).parts[0]
        kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and (p == path or p.suffix == ".db")}
        beside = {p: p.read_bytes() for p in folder.rglob("*-wal")}
        valid = path.read_bytes()
        changed = self._mutator.any(valid) if len(valid) < 50_000 else self._flipped(valid)
        if path.suffix == ".json" and self._rng.random() < 0.7:
            changed = _sealed(changed)
        path.write_bytes(changed)
        try:
            yield
        finally:
            for file in folder.rglob("*"):
                if file.name.endswith(("-wal", "-shm")):
                    file.unlink()
            for file, data in {**kept, **beside, path: valid}.items():
                file.write_bytes(data)

    def _flipped(self, valid: bytes) -> bytes:
        data = bytearray(valid)
        for _ in range(self._rng.randint(1, 4)):
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(data[: self._rng.randrange(len(data))] if self._rng.random() < 0.2 else data)

    def _lines(self, valid: bytes) -> bytes:
        """Some lines wrong, the others as they were; now and then the whole file."""
        if self._rng.random() < 0.15:
            return self._mutator.any(valid)
        lines = valid.splitlines()
        for _ in range(self._rng.randint(1, 3)):
            lines[self._rng.randrange(len(lines))] = self._mutator.any(self._rng.choice(lines))
        return b"\n".join(lines) + b"\n"

    def _parquet(self, path: Path) -> bytes:
        """Another table than the format's, or changed bytes."""
        if self._rng.random() < 0.6:
            with contextlib.suppress(
                pa.ArrowException, orjson.JSONDecodeError, TypeError, AttributeError, OverflowError
            ):
                rows = [
                    orjson.loads(self._mutator.any(json.dumps(row).encode())) for row in pq.read_table(path).to_pylist()
                ]
                out = io.BytesIO()
                pq.write_table(pa.Table.from_pylist(rows), out)
                return out.getvalue()
            table = pq.read_table(path)  # values of several types: one column of another kind instead
            name = self._rng.choice(table.column_names)
            value = self._rng.choice([v for v in STRANGE if not isinstance(v, list | dict)])
            out = io.BytesIO()
            changed = table.drop_columns([name]).append_column(name, pa.array([value] * table.num_rows))
            pq.write_table(changed, out)
            return out.getvalue()
        return self._mutator.any(path.read_bytes())

    def _toml(self, valid: dict[str, Any]) -> bytes:
        """TOML that says something else, or changed bytes of it."""
        if self._rng.random() < 0.3:
            return self._mutator.any(toml(valid).encode())
        changed = self._mutator.any(json.dumps(valid).encode())
        try:
            found = orjson.loads(changed)
        except orjson.JSONDecodeError:
            return changed
        try:
            return toml(found).encode() if isinstance(found, dict) else b"data_dir = " + changed
        except RecursionError:  # nested a thousand times
            return b"data_dir = " + changed


def _sealed(changed: bytes) -> bytes:
    """JSON with the checksum of what it says now, where it had one; other bytes as they are."""
    with contextlib.suppress(orjson.JSONDecodeError, TypeError):
        found = orjson.loads(changed)
        if isinstance(found, dict) and found.pop("crc", None) is not None:
            body = orjson.dumps(found)
            return body[:-1] + b',"crc":%d}' % zlib.crc32(body)
    return changed
