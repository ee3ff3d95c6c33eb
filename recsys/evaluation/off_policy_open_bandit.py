"""Open Bandit's CSV files (Saito et al. 2021): one row a shown item, with the probability it was drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from recsys.errors import BadInput
from recsys.evaluation.off_policy import LEAST, Float64, Rounds
from recsys.events.fields import MAX_POSITION

_AFFINITY = "user-item_affinity_"
_NEEDED = ("item_id", "position", "click", "propensity_score")
_SUM_TOLERANCE = 1e-3


def is_open_bandit(paths: Sequence[Path]) -> bool:
    """Whether these are CSV files; ours are Parquet and JSON lines."""
    return all(path.suffix == ".csv" for path in paths)


def read_open_bandit(paths: Sequence[Path], position: int | None = None) -> Rounds:
    """Each row is a round in the order of the files; every item of the campaign is in its pool, at every position.

    `affinity` is what a policy may rank by. The probabilities of the items not shown are known where all were the same.
    `position` leaves out the rows of others. 8 bytes an item and row for each of four arrays.
    """
    tables = [_read(path) for path in paths]
    sizes = [table[1].shape[1] for table in tables]
    for path, size in zip(paths, sizes, strict=True):
        if paths.count(path) > 1:
            raise BadInput(f"file {str(path)!r} is given twice: keep one", field="log")
        if size != sizes[0]:
            problem = f"file {str(path)!r} has {size} columns {_AFFINITY}*, and {str(paths[0])!r} has {sizes[0]}"
            raise BadInput(f"{problem}: evaluate one campaign at a time", field="log")
    affinity = np.concatenate([table[1] for table in tables])
    item, place, click, propensity = (np.concatenate([table[0][n] for table in tables]) for n in _NEEDED)
    rows = np.flatnonzero(place == position) if position is not None else np.arange(len(item))
    if not len(rows):
        raise BadInput(
            f"no row has position {position}: files have {np.unique(place).astype(int).tolist()}", field="position"
        )
    num, size = len(rows), affinity.shape[1]
    propensities = propensity[rows]
    same = bool((np.abs(propensities * size - 1) < _SUM_TOLERANCE).all())
    return Rounds(
        names=tuple(map(str, range(size))),
        starts=np.arange(num + 1) * size,
        items=np.tile(np.arange(size), num),
        logged=np.repeat(propensities, size) if same else np.full(num * size, np.nan),
        shown=np.arange(num) * size + item[rows].astype(np.int64),
        propensities=propensities,
        rewards=click[rows],
        users=np.arange(num),
        values={"affinity": affinity[rows].ravel()},
        left_out={"other_positions": len(item) - num} if len(item) > num else {},
    )


def _read(path: Path) -> tuple[dict[str, Float64], Float64]:
    where = f"file {str(path)!r}"
    try:
        table: Any = pcsv.read_csv(path)
        names: list[str] = table.column_names
    except OSError:
        raise BadInput(f"{where} cannot be read: check the path", field="log") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(f"{where} is not a CSV file ({error}): check it", field="log") from None
    if not table.num_rows:
        raise BadInput(f"{where} has no rows: name another", field="log")
    found = [name for name in names if name.startswith(_AFFINITY)]
    affinities = [f"{_AFFINITY}{n}" for n in range(len(found))]
    for name in found:
        if name not in affinities:
            problem = f"column {name!r} must end in a number from 0 to {len(found) - 1}, another for each item"
            raise BadInput(f"{where}: {problem}", field=name)
    for name in (*_NEEDED, *(affinities or [f"{_AFFINITY}0"])):
        if names.count(name) > 1:
            raise BadInput(f"{where}: column {name!r} is there {names.count(name)} times: keep one", field=name)
        if name not in names:
            remedy = "Open Bandit's files have it"
            if name == "propensity_score":
                remedy = (
                    "without propensities only dm, which trusts its model, would be valid, and it needs an event file"
                )
            raise BadInput(f"{where}: column {name!r} is missing: {remedy}", field=name)
    columns = {name: _numbers(table, name, where) for name in (*_NEEDED, *affinities)}
    ranges = {
        "item_id": (0, len(affinities) - 1),
        "position": (0, MAX_POSITION),
        "click": (0, 1),
        "propensity_score": (LEAST, 1),
    }
    for name, (low, high) in ranges.items():
        values, whole = columns[name], name in ("item_id", "position")
        wrong = np.flatnonzero(~((values >= low) & (values <= high)) | (whole & (values != np.floor(values))))
        if len(wrong):
            wanted = f"{'a whole number ' if whole else ''}from {low} to {high}"
            raise BadInput(f"{where} row {wrong[0] + 1}: {name} = {values[wrong[0]]:g} must be {wanted}", field=name)
    return columns, np.stack([columns[name] for name in affinities], 1)


def _numbers(table: Any, name: str, where: str) -> Float64:
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise BadInput(f"{where}: column {name!r} is {column.type}: must be numbers", field=name)
    numbers: Float64 = column.to_numpy().astype(np.float64)
    return numbers
