"""Rows of a file to import: what each says, by what it is known again, and whether the file is still the one that was begun."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson
import pyarrow.parquet as pq

from recsys.errors import BadInput
from recsys.events import messages

BATCH = 1000
"""Rows of one call, and most rows that are sent again after a crash."""
_BOM = b"\xef\xbb\xbf"
_REMEMBERED = 200_000
"""Rows back within which an equal one is told from it, at least: about 40 MB for twice as many."""


class Row(NamedTuple):
    """One row. Numbers count from 1; an empty line is a row without content."""

    number: int
    content: bytes | Mapping[str, Any]
    event_id: str
    """For a row that has none: of its content, and how many equal rows came before it."""
    position: int
    """Where the next row begins: bytes of JSON lines, rows of Parquet."""
    digest: str
    """Of the file as far as it says whether the rows until here are the same."""


class Rows(Protocol):
    """A file's rows, from the first one on."""

    total: int
    """The last position."""

    def __iter__(self) -> Iterator[Row]: ...


def open_rows(path: Path, layout: Mapping[str, Any]) -> Rows:
    """The rows of a file by its name's end. BadInput where it is neither, or has a column that no message has."""
    if path.suffix == ".jsonl":
        return _Lines(path)
    if path.suffix == ".parquet":
        return _Table(path, layout)
    raise BadInput(f"{str(path)!r} is neither .jsonl nor .parquet: convert or rename it", field="file")


class _Ids:
    """Event ids of rows that have none. The same rows get the same, in whatever file and after whichever corrections of others."""

    def __init__(self) -> None:
        self._counts: tuple[dict[bytes, int], dict[bytes, int]] = {}, {}

    def of(self, content: bytes) -> str:
        """The id of the next row with this content."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        newer, older = self._counts
        before = newer.get(digest, older.get(digest, 0))
        newer[digest] = before + 1
        if len(newer) == _REMEMBERED:
            self._counts = {}, newer
        made = hashlib.blake2b(digest, digest_size=16, salt=before.to_bytes(8, "little")).hexdigest()
        return f"import-{made}"


class _Lines:
    """JSON lines. The digest is of the bytes so far: a file may grow."""

    def __init__(self, path: Path) -> None:
        self._path, self.total = path, path.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        number, position, ids, digest = 0, 0, _Ids(), hashlib.blake2b(digest_size=16)
        with self._path.open("rb") as lines:
            # A line that is longer than any message is not kept whole: the parser refuses its beginning.
            while line := lines.readline(messages.MAX_MESSAGE_BYTES + 2):
                number += 1
                rest = line
                while rest:
                    digest.update(rest)
                    position += len(rest)
                    rest = b"" if rest.endswith(b"\n") else lines.readline(messages.MAX_MESSAGE_BYTES)
                content = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                yield Row(number, content, ids.of(content) if content else "", position, digest.hexdigest())


class _Table:
    """Parquet. The digest is of the whole file, which is written at once."""

    def __init__(self, path: Path, layout: Mapping[str, Any]) -> None:
        self._parquet = pq.ParquetFile(path)
        self.total = self._parquet.metadata.num_rows
        if unknown := [name for name in self._parquet.schema_arrow.names if name not in layout]:
            known = ", ".join(layout)
            raise BadInput(
                f"column {unknown[0]!r} of {str(path)!r} is not one of {known}: leave it out", field=unknown[0]
            )
        with path.open("rb") as file:
            self._digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def __iter__(self) -> Iterator[Row]:
        number, ids = 0, _Ids()
        for batch in self._parquet.iter_batches(BATCH):
            batch.validate(full=True)  # text that is not UTF-8
            for row in batch.to_pylist():
                number += 1
                event_id = ids.of(orjson.dumps(row, default=repr, option=orjson.OPT_SORT_KEYS))
                yield Row(number, {"version": messages.VERSION, **row}, event_id, number, self._digest)


def message_of(content: bytes | Mapping[str, Any]) -> bytes | dict[str, Any]:
    """What a row says, as the parser takes it; a Parquet row's free fields are JSON text."""
    if isinstance(content, bytes):
        return content
    message = dict(content)
    for name in ("attributes", "context"):
        if isinstance(text := message.get(name), str):
            try:
                message[name] = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise BadInput(
                    f"{name} = {messages.shorten(text)}: is not JSON ({error}): write an object", field=name
                ) from None
    return message
