"""`recsys import`: a file of items or feedback into running services, once, with an outcome per row."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from recsys import config
from recsys.clock import Clock, SystemClock
from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.columns import LAYOUT
from services.cli.client import Client, url_of
from services.cli.main import DONE, MISSED, emit
from services.common.process import Stop

BATCH = 1000
"""Rows of one call, and most rows that are sent again after a crash."""
_CALLS = {"items": ("PUT", "/v1/items", "items"), "events": ("POST", "/v1/feedback", "events")}

Row = tuple[int, int, bytes | Mapping[str, Any]]
"""Number from 1; where the next one begins (bytes of JSON lines, rows of Parquet); the message."""


@dataclass(slots=True, kw_only=True)
class State:
    """How far an import is: kept in a file beside the rows, so that it goes on there."""

    kind: str
    rows: int = 0
    position: int = 0
    outcomes_bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("accepted", "duplicate", "rejected"), 0))

    @classmethod
    def read(cls, path: Path, kind: str) -> State:
        try:
            state = cls(**orjson.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls(kind=kind)
        except (OSError, TypeError, orjson.JSONDecodeError) as error:
            raise BadInput(f"{str(path)!r} is unreadable ({error}): delete it to start again", field="file") from None
        if state.kind != kind:
            raise BadInput(f"{str(path)!r} is of an import of {state.kind}: delete it to import {kind}", field="kind")
        return state

    def write(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(orjson.dumps(asdict(self)))
        partial.replace(path)


def _lines(path: Path, state: State) -> Iterator[Row]:
    number = state.rows
    with path.open("rb") as lines:
        lines.seek(state.position)
        # A line that is longer than any message is not kept whole: the parser refuses its beginning.
        while line := lines.readline(messages.MAX_MESSAGE_BYTES + 2):
            number += 1
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(messages.MAX_MESSAGE_BYTES)
            yield number, lines.tell(), line.strip()


def _table_rows(path: Path, layout: Mapping[str, Any], state: State) -> Iterator[Row]:
    number = 0
    parquet = pq.ParquetFile(path)
    if unknown := [name for name in parquet.schema_arrow.names if name not in layout]:
        known = ", ".join(layout)
        raise BadInput(f"column {unknown[0]!r} of {str(path)!r} is not one of {known}: leave it out", field=unknown[0])
    for batch in parquet.iter_batches(BATCH):
        if number + batch.num_rows <= state.rows:
            number += batch.num_rows
            continue
        for row in batch.to_pylist():
            number += 1
            if number > state.rows:
                yield number, number, {"version": messages.VERSION, **row}


def _from_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message of a Parquet row, whose free fields are JSON text."""
    for name in ("attributes", "context"):
        if isinstance(text := message.get(name), str):
            try:
                message[name] = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise BadInput(
                    f"{name} = {messages.shorten(text)}: is not JSON ({error}): write an object", field=name
                ) from None
    return message


class Import:
    """One file on its way into the services."""

    def __init__(self, kind: str, path: Path, client: Client, clock: Clock) -> None:
        self.path, self._kind, self._client, self._clock = path, kind, client, clock
        self._state_path = path.with_name(path.name + ".import.json")
        self.state = State.read(self._state_path, kind)
        self._is_table = path.suffix == ".parquet"
        if path.suffix not in (".parquet", ".jsonl"):
            raise BadInput(f"{str(path)!r} is neither .jsonl nor .parquet: convert or rename it", field="file")
        with self._reading():
            self.total = pq.read_metadata(path).num_rows if self._is_table else path.stat().st_size
        if self.total < self.state.position:
            where = f"{str(path)!r} is shorter than what was imported of it"
            raise BadInput(f"{where}: delete {str(self._state_path)!r} to start again", field="file")

    def run(self, outcomes_path: Path, progress: Callable[[int], None]) -> None:
        """Send the rest of the file. A batch's outcomes are written, then how far the import is."""
        with self._reading(), outcomes_path.open("ab") as out:
            self.state.outcomes_bytes = min(self.state.outcomes_bytes, out.tell())
            out.truncate(self.state.outcomes_bytes)  # what a crash left of a batch that will be sent again
            rows = self._rows()
            while batch := list(islice(rows, BATCH)):
                outcomes = self._send(batch)
                out.writelines(orjson.dumps(outcome) + b"\n" for outcome in outcomes)
                out.flush()
                self._advance(batch[-1], outcomes, out)
                progress(self.state.position)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise BadInput(
                f"import of {str(self.path)!r}: {error}: check the file and its folder", field="file"
            ) from None

    def _rows(self) -> Iterator[Row]:
        if self._is_table:
            return _table_rows(self.path, LAYOUT["item" if self._kind == "items" else "feedback"], self.state)
        return _lines(self.path, self.state)

    def _advance(self, last: Row, outcomes: list[dict[str, Any]], out: BinaryIO) -> None:
        state = self.state
        state.rows, state.position, state.outcomes_bytes = last[0], last[1], out.tell()
        for outcome in outcomes:
            state.counts[outcome["status"]] += 1
        state.write(self._state_path)

    def _send(self, batch: list[Row]) -> list[dict[str, Any]]:
        """One outcome a row (none for an empty line), in order."""
        outcomes: list[dict[str, Any]] = []
        good: list[tuple[dict[str, Any], bytes]] = []
        for number, _, raw in batch:
            if not raw:
                continue
            outcome: dict[str, Any] = {"row": number}
            outcomes.append(outcome)
            try:
                outcome["id"], message = self._message(number, raw)
                good.append((outcome, message))
            except BadInput as error:
                outcome |= {"status": "rejected", "reason": str(error)}
        answers = self._client.outcomes(*_CALLS[self._kind], [message for _, message in good]) if good else []
        for (outcome, _), answer in zip(good, answers, strict=True):
            outcome |= {name: answer[name] for name in ("status", "reason") if name in answer}
        return outcomes

    def _message(self, number: int, raw: bytes | Mapping[str, Any]) -> tuple[str, bytes]:
        checked = raw if isinstance(raw, bytes) else _from_text(dict(raw))
        if self._kind == "items":
            item = messages.parse_item(checked)
            return item.item_id, messages.dump_item(item)
        # Of name and number, so that a row that is sent twice is a duplicate.
        made = hashlib.blake2b(f"{self.path.name}\0{number}".encode(), digest_size=16).hexdigest()
        event = messages.parse_feedback(checked, event_id=f"import-{made}", time_ms=self._clock.now_ms())
        return event.event_id, messages.dump_feedback(event)


def run(options: argparse.Namespace) -> int:
    """Import what is left of the file; counts are of the whole file."""
    client = Client(url_of(config.load(options.config), options.url), Stop())
    outcomes = options.outcomes or options.file.with_name(options.file.name + ".outcomes.jsonl")
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with contextlib.closing(client), Progress(*columns, console=Console(stderr=True)) as bar:
        importing = Import(options.kind, options.file, client, SystemClock())
        before = importing.state.rows
        task = bar.add_task(f"import {options.kind}", total=importing.total, completed=importing.state.position)
        importing.run(outcomes, lambda done: bar.update(task, completed=done))
    state = importing.state
    counts = {"rows": state.rows, **state.counts, "rows_before": before}
    emit(options, {"ok": not state.counts["rejected"], **counts, "outcomes": str(outcomes)})
    return MISSED if state.counts["rejected"] else DONE
