"""Filters of a request: read, and told."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from recsys.events.fields import MAX_VALUES, bad, parse_number
from recsys.features.filters import Clause, Filters

_CONDITIONS = ("any", "all", "none", "min", "max")


def parse_filters(raw: Any, attributes: Iterable[str], field: str = "filters") -> Filters:
    """An object of attribute → value, list of values, or {any, all, none, min, max}; BadInput names what is wrong in it.

    Equal filters, however they were written, are equal values.
    """
    if raw is None:
        return ()
    if not isinstance(raw, Mapping):
        raise bad(field, raw, 'must be an object of attributes, such as {"category": ["news", "sport"]}')
    known = list(attributes)
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            remedy = f"did you mean {near[0]!r}? Known: {', '.join(known)}" if near else "catalogue.attributes is empty"
            raise bad(f"{field}.{str(name)[:64]}", name, f"is not one of catalogue.attributes: {remedy}")
    return tuple(_clause(name, raw[name], f"{field}.{name}") for name in sorted(raw))


def _clause(attribute: str, raw: Any, field: str) -> Clause:
    if not isinstance(raw, Mapping):
        return Clause(attribute=attribute, any=_values(raw, field))
    if not raw:
        raise bad(field, raw, f"name a condition: {', '.join(_CONDITIONS)}")
    for name in raw:
        if name not in _CONDITIONS:
            near = difflib.get_close_matches(str(name), _CONDITIONS, n=1, cutoff=0.0)[0]
            raise bad(field, name, f"is no condition, did you mean {near!r}? Known: {', '.join(_CONDITIONS)}")
    low, high = (
        parse_number(raw[n], f"{field}.{n}") if n in raw else b for n, b in (("min", -math.inf), ("max", math.inf))
    )
    if low > high:
        raise bad(f"{field}.min", low, f"is above max = {high:g}: no number lies between")
    lists = {name: _values(raw[name], f"{field}.{name}") for name in ("any", "all", "none") if name in raw}
    return Clause(attribute=attribute, **lists, low=low, high=high)


def _values(raw: Any, field: str) -> tuple[str, ...]:
    """Values as the catalogue knows them: their text, distinct, sorted."""
    values = raw if isinstance(raw, list | tuple) else [raw]
    if not 0 < len(values) <= MAX_VALUES:
        raise bad(field, raw, f"must be a value or a list of 1 to {MAX_VALUES} of them")
    for value in values:
        if not isinstance(value, str | int | float):
            raise bad(field, value, "must be a string, a number or a boolean")
    return tuple(sorted({value if isinstance(value, str) else str(value) for value in values}))


def described(filters: Filters) -> str:
    """The filters in one short line."""
    parts = []
    for clause in filters:
        for name in ("any", "all", "none"):
            if values := getattr(clause, name):
                more = ", …" if len(values) > 3 else ""
                parts.append(f"{clause.attribute} {name} of {', '.join(values[:3])}{more}")
        if clause.ranged:
            parts.append(f"{clause.attribute} from {clause.low:g} to {clause.high:g}")
    return "; ".join(parts)
