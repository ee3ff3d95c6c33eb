"""`recsys import`: a file of items or feedback into running services, once, with an outcome per row."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from recsys import config
from recsys.clock import Clock, SystemClock
from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.columns import LAYOUT
from services.cli.client import Away, Client, url_of
from services.cli.import_rows import BATCH, Row, Rows, message_of, open_rows
from services.cli.main import DONE, MISSED, emit
from services.common.process import Stop

_CALLS = {"items": ("PUT", "/v1/items", "items"), "events": ("POST", "/v1/feedback", "events")}
_TOPICS = {"items": "item", "events": "feedback"}
_MOST = 2**53
_STATUSES = ("accepted", "duplicate", "rejected")


def _no_counts() -> dict[str, int]:
    return dict.fromkeys(_STATUSES, 0)


@dataclass(slots=True, kw_only=True)
class State:
    """How far an import is: kept in a file beside the rows, so that it goes on there."""

    kind: str
    rows: int = 0
    position: int = 0
    outcomes_bytes: int = 0
    counts: dict[str, int] = field(default_factory=_no_counts)
    digest: str = ""
    """Of the file until `position`; "" where an earlier version wrote this."""
    system: str = ""
    """The log that took the rows."""

    @classmethod
    def read(cls, path: Path, kind: str) -> State:
        try:
            state = cls(**orjson.loads(path.read_bytes()))
            state.check()
        except FileNotFoundError:
            return cls(kind=kind)
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise BadInput(f"{str(path)!r} is unreadable ({error}): delete it to start again", field="file") from None
        if state.kind != kind:
            raise BadInput(f"{str(path)!r} is of an import of {state.kind}: delete it to import {kind}", field="kind")
        return state

    def check(self) -> None:
        """ValueError where it holds what no import wrote."""
        numbers = (self.rows, self.position, self.outcomes_bytes, *(self.counts[status] for status in _STATUSES))
        if any(type(number) is not int or not 0 <= number < _MOST for number in numbers):
            raise ValueError(f"not all of {numbers} are counts")
        if not isinstance(self.digest, str) or not isinstance(self.system, str):
            raise ValueError(f"digest {self.digest!r} or system {self.system!r} is no text")

    def write(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(orjson.dumps(asdict(self)))
        partial.replace(path)


class Import:
    """One file on its way into one system."""

    def __init__(self, kind: str, path: Path, client: Client, clock: Clock, say: Callable[[str], None]) -> None:
        """`say` is told why an import that was begun starts again."""
        self.path, self._kind, self._client, self._clock = path, kind, client, clock
        self._state_path = path.with_name(path.name + ".import.json")
        state = State.read(self._state_path, kind)
        with self._reading():
            self._rows: Rows = open_rows(path, LAYOUT[_TOPICS[kind]])
            system = client.system(_TOPICS[kind])
            if state.rows and (why := self._other(state, system)):
                say(f"{why}: importing it from its first row; rows that the system has already are duplicates")
                state = State(kind=kind)
        state.system = system
        self.state, self.total = state, self._rows.total
        self.before = State(**asdict(state))
        """As this run found it."""
        self.counts = _no_counts()
        """Of this run."""

    def _other(self, state: State, system: str) -> str:
        """Why what was imported is not what this file holds, or is not in this system; empty when it is."""
        if state.system and state.system != system:
            return f"{str(self.path)!r} was imported into another system"
        last = next(islice(self._rows, state.rows - 1, None), None)
        if last is None or last.position != state.position or state.digest not in ("", last.digest):
            return f"{str(self.path)!r} has changed since it was imported"
        return ""

    def run(self, outcomes_path: Path, progress: Callable[[int], None]) -> None:
        """Send the rest of the file. A batch's outcomes are written, then how far the import is."""
        with self._reading(), outcomes_path.open("ab") as out:
            self.state.outcomes_bytes = min(self.state.outcomes_bytes, out.tell())
            out.truncate(self.state.outcomes_bytes)  # what a crash left of a batch that will be sent again
            rows = islice(self._rows, self.state.rows, None)
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
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise BadInput(
                f"import of {str(self.path)!r}: {error}: check the file and its folder", field="file"
            ) from None

    def _advance(self, last: Row, outcomes: Sequence[dict[str, Any]], out: BinaryIO) -> None:
        state = self.state
        state.rows, state.position, state.digest = last.number, last.position, last.digest
        state.outcomes_bytes = out.tell()
        for outcome in outcomes:
            state.counts[outcome["status"]] += 1
            self.counts[outcome["status"]] += 1
        state.write(self._state_path)

    def _send(self, batch: Sequence[Row]) -> list[dict[str, Any]]:
        """One outcome a row (none for an empty line), in order."""
        outcomes: list[dict[str, Any]] = []
        good: list[tuple[dict[str, Any], bytes]] = []
        for row in batch:
            if not row.content:
                continue
            outcome: dict[str, Any] = {"row": row.number}
            outcomes.append(outcome)
            try:
                outcome["id"], message = self._message(row)
                good.append((outcome, message))
            except BadInput as error:
                outcome |= {"status": "rejected", "reason": str(error)}
        answers = self._client.outcomes(*_CALLS[self._kind], [message for _, message in good]) if good else []
        for (outcome, _), answer in zip(good, answers, strict=True):
            outcome |= {name: answer[name] for name in ("status", "note", "reason") if name in answer}
        return outcomes

    def _message(self, row: Row) -> tuple[str, bytes]:
        message = message_of(row.content)
        if self._kind == "items":
            item = messages.parse_item(message)
            return item.item_id, messages.dump_item(item)
        event = messages.parse_feedback(message, event_id=row.event_id, time_ms=self._clock.now_ms())
        return event.event_id, messages.dump_feedback(event)


def run(options: argparse.Namespace) -> int:
    """Import what is left of the file; outcomes are counted of this run, rows of the whole file."""
    if not options.file.is_file():
        raise BadInput(f"{str(options.file)!r} is no file: check its name", field="file")
    client = Client(url_of(config.load(options.config), options.url), Stop())
    outcomes = options.outcomes or options.file.with_name(options.file.name + ".outcomes.jsonl")
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    console = Console(stderr=True, soft_wrap=True)
    try:
        with contextlib.closing(client), Progress(*columns, console=console) as bar:
            importing = Import(options.kind, options.file, client, SystemClock(), bar.console.print)
            begun = importing.before
            task = bar.add_task(f"import {options.kind}", total=importing.total, completed=begun.position)
            importing.run(outcomes, lambda done: bar.update(task, completed=done))
    except Away as error:
        raise BadInput(f"{error}; then import again, it goes on where it was", field="url") from None
    rejected = importing.state.counts["rejected"]
    before = {"rows_before": begun.rows, "rejected_before": begun.counts["rejected"]}
    counts = {"rows": importing.state.rows, **importing.counts, **before}
    emit(options, {"ok": not rejected, **counts, "outcomes": str(outcomes)})
    return MISSED if rejected else DONE
