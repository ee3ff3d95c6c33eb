"""What the columns of a file from outside must hold: checked as a whole, before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.errors import BadInput
from recsys.events import fields

t = pa.types


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a column's values are: `fits` takes its Arrow type, `right` says of each value whether it is one."""

    name: str
    fits: Callable[[Any], bool]
    right: Callable[[Any], Any]


Rules: TypeAlias = Mapping[str, tuple[Kind, bool]]
"""Column → its kind, and whether it may hold nulls."""


def _is_text(type_: Any) -> bool:
    inner = type_.value_type if t.is_dictionary(type_) else type_
    return bool(t.is_string(inner) or t.is_large_string(inner))


def _is_number(type_: Any) -> bool:
    return bool(t.is_integer(type_) or t.is_floating(type_))


def _short(values: Any) -> Any:
    return pc.less_equal(pc.binary_length(values), fields.MAX_TEXT_BYTES)


def _within(low: float, high: float) -> Callable[[Any], Any]:
    return lambda values: pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))


_EXACT = 2.0**53
"""Up to here a float is the whole number that was meant."""


def _whole(values: Any) -> Any:
    finite = pc.is_finite(values)
    if not t.is_floating(values.type):
        return finite
    return pc.and_(pc.and_(finite, _within(-_EXACT, _EXACT)(values)), pc.equal(pc.floor(values), values))


INTEGER = Kind(name="an integer", fits=t.is_integer, right=_whole)
WHOLE = Kind(name="a whole number", fits=_is_number, right=_whole)
NUMBER = Kind(name="a finite number", fits=_is_number, right=pc.is_finite)
TIME_MS = Kind(name="integer milliseconds since 1970", fits=t.is_integer, right=_within(0, fields.MAX_TIME_MS))
TIME_S = Kind(name="integer seconds since 1970", fits=t.is_integer, right=_within(0, fields.MAX_TIME_MS // 1000))
LABEL = Kind(name="0 or 1", fits=t.is_integer, right=_within(0, 1))
TEXT = Kind(name=f"text of at most {fields.MAX_TEXT_BYTES} bytes", fits=_is_text, right=_short)
INTEGERS = Kind(
    name="integers with spaces between",
    fits=_is_text,
    right=lambda values: pc.match_substring_regex(values, r"^ *([0-9]{1,18}( +|$))*$"),
)
SCALAR = Kind(
    name=f"a finite number, or text of at most {fields.MAX_TEXT_BYTES} bytes",
    fits=lambda type_: _is_text(type_) or _is_number(type_),
    right=lambda values: pc.is_finite(values) if _is_number(values.type) else _short(values),
)


def check(path: Path, rules: Rules) -> None:
    """Read these columns of a Parquet file, a batch at a time. BadInput names file, row (from 1), column and value of what is
    wrong, and the remedy; a file without rows is wrong, too."""
    try:
        with pq.ParquetFile(path) as file:
            _check_types(path, {field.name: field.type for field in file.schema_arrow}, rules)
            row = 0
            for batch in file.iter_batches(columns=list(rules)):
                batch.validate(full=True)  # text that is not UTF-8
                for name, (kind, nullable) in rules.items():
                    _check_values(f"{path} row", row, name, batch.column(name), kind, nullable)
                row += batch.num_rows
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(f"file {str(path)!r} cannot be read ({error}): check it", field="file") from None
    if not row:
        raise BadInput(f"file {str(path)!r} has no rows: write it again, or name another", field="file")


def _check_types(path: Path, found: Mapping[str, Any], rules: Rules) -> None:
    for name, (kind, nullable) in rules.items():
        if name not in found:
            raise BadInput(f"file {str(path)!r} has no column {name!r}: it must have {list(rules)}", field=name)
        if not (kind.fits(found[name]) or (nullable and t.is_null(found[name]))):
            raise BadInput(
                f"file {str(path)!r}: column {name!r} is {found[name]}: must be {kind.name}: convert it", field=name
            )


def _check_values(where: str, row: int, name: str, values: Any, kind: Kind, nullable: bool) -> None:
    if t.is_null(values.type):
        return
    if t.is_dictionary(values.type):
        values = values.dictionary_decode()
    right = pc.fill_null(kind.right(values), nullable)
    if (first := pc.index(right, False).as_py()) >= 0:
        error = fields.bad(name, values[first].as_py(), f"must be {kind.name}: repair the row, or leave it out")
        raise BadInput(f"{where} {row + first + 1}: {error}", field=name)
