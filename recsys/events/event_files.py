"""Event files: what happened, in time order, as Parquet or JSON lines.

A folder, or a list of files, named `items`, `impressions` or `feedback` (anything may follow: `feedback_day2`), with
`.parquet` (layout: `recsys.events.columns`) or `.jsonl` (the public messages, one a line). `time_ms` is the event's
time and, for a replay, log time: within a file it never goes back. Everything streams; memory is bounded by a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.errors import BadInput, nearest
from recsys.events import columns, messages
from recsys.events.columns import LAYOUT, REQUIRED, Message
from recsys.types import Feedback, Impression, Item

Event: TypeAlias = tuple[int, str, Message]

NAMES = {"item": "items", "impression": "impressions", "feedback": "feedback"}
"""Kind of message → name of its files."""
BATCH_ROWS = 32_768
"""Rows held at once of each file, about 30 MB: half costs 2% of the speed, double gains nothing."""

STRUCT_REQUIRED = {"item_id", "position", "probability"}
"""Fields that each struct that has them at all must have."""

_PARSE = {"item": messages.parse_item, "impression": messages.parse_impression, "feedback": messages.parse_feedback}
_DUMP = {"item": messages.dump_item, "impression": messages.dump_impression, "feedback": messages.dump_feedback}


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path
    kind: str


def write_events(
    folder: Path | str,
    items: Iterable[Item],
    impressions: Iterable[Impression],
    feedback: Iterable[Feedback],
    *,
    jsonl: bool = False,
) -> dict[str, int]:
    """Write the three files of a folder and return their numbers of rows; a file appears only when it is complete.

    Streams. Impressions and feedback must be in time order: BadInput names the first that is not.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        for kind, stream in (("item", items), ("impression", impressions), ("feedback", feedback)):
            path = folder / f"{NAMES[kind]}.{'jsonl' if jsonl else 'parquet'}"
            partial = path.with_name(f".{path.name}.partial")
            try:
                counts[NAMES[kind]] = (_write_jsonl if jsonl else _write_parquet)(partial, kind, stream)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"folder {str(folder)!r} cannot be written ({error}): choose another", field="folder") from None
    return counts


def read_items(paths: Path | str | Sequence[Path | str]) -> Iterator[Item]:
    """The items of all item files, in the order of the files."""
    return chain.from_iterable(_batches(f) for f in _files(paths) if f.kind == "item")


def merged(paths: Path | str | Sequence[Path | str]) -> Iterator[Event]:
    """(time_ms, kind, message) of all files in event-time order: items first, at the time of the first event.

    At equal times impressions come before feedback, files in the order given, rows in the order of the file.
    """
    files = _files(paths)
    streams = [_events(f) for kind in ("impression", "feedback") for f in files if f.kind == kind]
    events = heapq.merge(*streams, key=itemgetter(0)) if len(streams) > 1 else chain(*streams)
    first = next(events, None)
    if first is None:
        names = ", ".join(str(f.path) for f in files)
        raise BadInput(f"no impression and no feedback in {names}: name files with rows", field="events")
    items: Iterator[Event] = ((first[0], "item", item) for item in read_items(paths))
    return chain(items, (first,), events)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What occurs in event files: item attributes, context fields of impressions and feedback, feedback types."""

    attributes: set[str]
    context: set[str]
    types: set[str]


def names_in(
    paths: Path | str | Sequence[Path | str], on_progress: Callable[[int, int], None] = lambda *_: None
) -> Names:
    """Read and check every row as `merged` does, at about 5 µs each, and keep the names; `on_progress(events, event time)` now and then."""
    names = Names(attributes=set(), context=set(), types=set())
    for count, (time_ms, _, message) in enumerate(merged(paths), 1):
        if isinstance(message, Item):
            names.attributes.update(message.attributes)
        else:
            names.context.update(message.context or ())
            if isinstance(message, Feedback):
                names.types.add(message.type)
        if count % 8192 == 0:
            on_progress(count, time_ms)
    return names


def count_rows(paths: Path | str | Sequence[Path | str]) -> dict[str, int]:
    """Rows of each kind, without reading them (JSON lines are counted): for a progress bar."""
    counts = dict.fromkeys(NAMES, 0)
    for file in _files(paths):
        if file.path.suffix == ".jsonl":
            with _open(file) as lines:
                counts[file.kind] += sum(block.count(b"\n") for block in iter(lambda: lines.read(2**20), b""))
        else:
            counts[file.kind] += _parquet(file).metadata.num_rows
    return counts


def _files(paths: Path | str | Sequence[Path | str]) -> list[_File]:
    found: list[_File] = []
    for path in map(Path, [paths] if isinstance(paths, Path | str) else paths):
        if path.is_dir():
            inside = [f for p in sorted(path.iterdir()) if not p.name.startswith(".") and (f := _file(p))]
            if not inside:
                raise BadInput(f"folder {str(path)!r} has no {_expected()}: name another folder", field="events")
            found += inside
        elif not path.exists():
            raise BadInput(f"{str(path)!r} does not exist: check the path", field="events")
        elif file := _file(path):
            found.append(file)
        else:
            raise BadInput(f"file {str(path)!r} is none of {_expected()}: rename it", field="events")
    names = {(f.path.parent, f.path.stem): f.path for f in found}
    if len(names) < len(found):
        twice = next(f.path for f in found if names[f.path.parent, f.path.stem] != f.path or found.count(f) > 1)
        raise BadInput(f"file {str(twice)!r} is given twice, or as .parquet and as .jsonl: keep one", field="events")
    return found


def _file(path: Path) -> _File | None:
    kind = next((k for k, name in NAMES.items() if path.name.startswith(name)), None)
    return _File(path=path, kind=kind) if kind and path.suffix in (".parquet", ".jsonl") else None


def _expected() -> str:
    return "items, impressions or feedback with .parquet or .jsonl"


def _events(file: _File) -> Iterator[Event]:
    last, row = 0, 0
    for batch in _batch_lists(file):
        times = np.fromiter((m.time_ms for m in batch), np.int64, len(batch))
        check_order(str(file.path), times, last, row)
        last, row = int(times[-1]), row + len(batch)
        yield from zip(times.tolist(), repeat(file.kind), batch, strict=False)


def check_order(name: str, times: Any, last: int, row: int) -> None:
    back = np.flatnonzero(np.diff(times, prepend=last) < 0)
    if len(back):
        i = int(back[0])
        before = int(times[i - 1]) if i else last
        problem = f"time_ms = {times[i]} is before {before} of the row above"
        raise BadInput(f"{name} row {row + i + 1}: {problem}: sort the file by time_ms", field="time_ms")


def _batches(file: _File) -> Iterator[Any]:
    return chain.from_iterable(_batch_lists(file))


def _batch_lists(file: _File) -> Iterator[list[Any]]:
    """The rows of a file, a non-empty batch at a time; rows in messages count from 1."""
    return _jsonl_batches(file) if file.path.suffix == ".jsonl" else _parquet_batches(file)


def _jsonl_batches(file: _File) -> Iterator[list[Any]]:
    parse: Any = _PARSE[file.kind]
    row = 0
    with _open(file) as lines:
        # A line that is longer than any message is not read whole: the parser refuses its beginning.
        bounded = iter(lambda: lines.readline(messages.MAX_MESSAGE_BYTES + 2), b"")
        while batch := list(islice(bounded, BATCH_ROWS)):
            parsed = []
            for line in batch:
                row += 1
                try:
                    if line := line.strip():
                        parsed.append(parse(line))
                except BadInput as error:
                    raise BadInput(f"{file.path} row {row}: {error}", field=error.field) from None
            if parsed:
                yield parsed


def _parquet_batches(file: _File) -> Iterator[list[Any]]:
    batches = _parquet(file).iter_batches(BATCH_ROWS)
    row = 0
    while True:
        try:
            if (batch := next(batches, None)) is None:
                return
            parsed = columns.messages_of(file.kind, _cast(batch, file.kind)) if batch.num_rows else []
        except columns.RowError as error:
            raise BadInput(f"{file.path} row {row + error.row + 1}: {error}", field=error.field) from None
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            problem = f"cannot be read after row {row} ({error})"
            raise BadInput(f"file {str(file.path)!r} {problem}: write it again", field="events") from None
        if parsed:
            yield parsed
        row += batch.num_rows


def _cast(batch: Any, kind: str) -> Any:
    """The batch with exactly the types of the layout; `_check_type` has made sure that they can be converted."""
    names = batch.schema.names
    return pa.RecordBatch.from_arrays([batch.column(n).cast(LAYOUT[kind][n]) for n in names], names)


def _open(file: _File) -> BinaryIO:
    try:
        return file.path.open("rb")
    except OSError as error:
        raise BadInput(f"file {str(file.path)!r} cannot be read ({error.strerror}): check it", field="events") from None


def _parquet(file: _File) -> Any:
    where, layout = f"file {str(file.path)!r}", LAYOUT[file.kind]
    try:
        parquet = pq.ParquetFile(file.path)
        found = {f.name: f.type for f in parquet.schema_arrow}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(f"{where} is not a Parquet file ({error}): write it again", field="events") from None
    _check_fields(where, "", found, layout, REQUIRED[file.kind])
    return parquet


def _check_fields(
    where: str, path: str, found: dict[str, Any], layout: dict[str, Any], required: Collection[str]
) -> None:
    """Refuse unknown, missing and mistyped columns, or fields of a struct column."""
    for name in found:
        if name not in layout:
            problem = (
                f"column {path + name!r} is not known: did you mean {path + nearest(name, layout)!r}? Else leave it out"
            )
            raise BadInput(f"{where}: {problem}", field=path + name)
        _check_type(where, path + name, found[name], layout[name])
    for name in required:
        if name not in found:
            raise BadInput(f"{where}: column {path + name!r} is missing: add it", field=path + name)


def _check_type(where: str, name: str, found: Any, wanted: Any) -> None:
    is_id = name.endswith("_id")
    if not _fits(found, wanted, is_id):
        either = " or an integer" if is_id else ""
        raise BadInput(f"{where}: column {name!r} is {found}: must be {wanted}{either}", field=name)
    if pa.types.is_null(found):
        return
    if pa.types.is_list(wanted):
        _check_type(where, name, found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        inside, layout = ({f.name: f.type for f in t} for t in (found, wanted))
        _check_fields(where, name + ".", inside, layout, STRUCT_REQUIRED & layout.keys())


def _fits(found: Any, wanted: Any, is_id: bool) -> bool:
    t = pa.types
    if t.is_dictionary(found):
        found = found.value_type
    if t.is_null(found):
        return True
    if t.is_string(wanted):
        return t.is_string(found) or t.is_large_string(found) or (is_id and t.is_integer(found))
    if t.is_integer(wanted):
        return bool(t.is_integer(found)) and not t.is_uint64(found)
    if t.is_floating(wanted):
        return t.is_floating(found) or t.is_integer(found)
    if t.is_binary(wanted):
        return t.is_binary(found) or t.is_large_binary(found)
    if t.is_list(wanted):
        return t.is_list(found) or t.is_large_list(found)
    return t.is_struct(found) if t.is_struct(wanted) else found == wanted


def _write_parquet(path: Path, kind: str, stream: Iterable[Any]) -> int:
    rows, last, rest = 0, 0, iter(stream)
    with pq.ParquetWriter(path, columns.arrow_schema(kind), compression="zstd") as writer:
        while batch := list(islice(rest, BATCH_ROWS)):
            last = _checked_end(NAMES[kind], kind, batch, last, rows)
            writer.write_batch(columns.batch_of(kind, batch))
            rows += len(batch)
    return rows


def _write_jsonl(path: Path, kind: str, stream: Iterable[Any]) -> int:
    rows, last, rest, dump = 0, 0, iter(stream), _DUMP[kind]
    with path.open("wb") as lines:
        while batch := list(islice(rest, BATCH_ROWS)):
            last = _checked_end(NAMES[kind], kind, batch, last, rows)
            lines.writelines(dump(m) + b"\n" for m in batch)  # type: ignore[operator]
            rows += len(batch)
    return rows


def _checked_end(name: str, kind: str, batch: list[Any], last: int, row: int) -> int:
    if kind == "item":
        return 0
    times = np.fromiter((m.time_ms for m in batch), np.int64, len(batch))
    check_order(name, times, last, row)
    return int(times[-1])
