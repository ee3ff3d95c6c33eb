"""Filters, boosts and pins of a request: read, and told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from recsys.config import Config
from recsys.config.slate_section import MAX_BOOST
from recsys.config.source_list import without_quota
from recsys.errors import nearest
from recsys.events.fields import MAX_TEXT_BYTES, MAX_VALUES, bad, parse_id, parse_number, parse_position, parse_text
from recsys.features.filters import Clause, Filters
from recsys.ranking.request import Boost

_CONDITIONS = ("any", "all", "none", "min", "max")
MAX_RULES = 20
"""Boosts, and pins, of one request."""


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
            near = nearest(name, known)
            remedy = f"did you mean {near!r}? Known: {', '.join(known)}" if near else "catalogue.attributes is empty"
            raise bad(f"{field}.{str(name)[:64]}", name, f"is not one of catalogue.attributes: {remedy}")
    return tuple(_clause(name, raw[name], f"{field}.{name}") for name in sorted(raw))


def _clause(attribute: str, raw: Any, field: str) -> Clause:
    if not isinstance(raw, Mapping):
        return Clause(attribute=attribute, any=_values(raw, field))
    if not raw:
        raise bad(field, raw, f"name a condition: {', '.join(_CONDITIONS)}")
    for name in raw:
        if name not in _CONDITIONS:
            near = nearest(name, _CONDITIONS)
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
        if isinstance(value, str):
            parse_text(value, field, MAX_TEXT_BYTES)
    return tuple(sorted({value if isinstance(value, str) else str(value) for value in values}))


def parse_boosts(raw: Any, config: Config, field: str = "boosts") -> tuple[Boost, ...]:
    """A list of {filters, sources, times, plus}."""
    sources = [name for name, quota in config.retrieval.sources.items() if quota] + without_quota()
    boosts = []
    for number, one in enumerate(_rules(raw, field, '[{"filters": {"category": "news"}, "times": 2}]')):
        here = f"{field}[{number}]"
        _known(one, ("filters", "sources", "times", "plus"), here)
        names = one.get("sources", [])
        if not isinstance(names, list) or not set(map(str, names)) <= set(sources):
            raise bad(f"{here}.sources", names, f"must be a list of some of {', '.join(sources)}")
        filters = parse_filters(one.get("filters"), config.catalogue.attributes, f"{here}.filters")
        if not filters and not names:
            raise bad(here, one, "name filters or sources, or the boost is for every item alike")
        times = parse_number(one.get("times", 1.0), f"{here}.times", 0.0, MAX_BOOST)
        plus = parse_number(one.get("plus", 0.0), f"{here}.plus", -MAX_BOOST, MAX_BOOST)
        boosts.append(Boost(filters=filters, sources=tuple(names), times=times, plus=plus))
    return tuple(boosts)


def parse_pins(raw: Any, field: str = "pins") -> dict[int, str]:
    """A list of {position, item_id}, each of both once."""
    pins: dict[int, str] = {}
    for number, one in enumerate(_rules(raw, field, '[{"position": 1, "item_id": "a1"}]')):
        here = f"{field}[{number}]"
        _known(one, ("position", "item_id"), here)
        position = parse_position(one.get("position"), f"{here}.position")
        item_id = parse_id(one.get("item_id"), f"{here}.item_id")
        if position in pins or item_id in pins.values():
            raise bad(here, item_id, f"position {position} and each item can be pinned once")
        pins[position] = item_id
    return pins


def _rules(raw: Any, field: str, example: str) -> list[Mapping[str, Any]]:
    rules = [] if raw is None else raw
    if not isinstance(rules, list) or len(rules) > MAX_RULES or not all(isinstance(one, Mapping) for one in rules):
        raise bad(field, raw, f"must be a list of at most {MAX_RULES} objects, such as {example}")
    return rules


def _known(raw: Mapping[str, Any], names: tuple[str, ...], field: str) -> None:
    for name in raw:
        if name not in names:
            raise bad(field, name, f"is not a known field, did you mean {nearest(name, names)!r}?")


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
