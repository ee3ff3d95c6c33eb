"""What changed between two configurations, in sentences: additions, which a start makes by itself, and what would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.features.convert import MISSING, Counted, counted, renamed_numbers, slot_names
from recsys.features.schema import Schema
from recsys.training.migration.made_of import FIXED


class Change(NamedTuple):
    """One sentence; `loses`: something learned is dropped, or predictions move."""

    text: str
    loses: bool = False


def changes(before: Config, after: Config) -> list[Change]:
    """All of them. SchemaMismatch names an option that nothing can be carried over with."""
    _refuse_impossible(before, after)
    old, new = Schema.of(before), Schema.of(after)
    return [
        *_slots(old, new),
        *_counters(old, new),
        *_history(old, new),
        *_tasks(before, after),
        *_model(before, after),
        *_table(before, after),
    ]


def _refuse_impossible(before: Config, after: Config) -> None:
    pairs = [(f"model.{name}", getattr(before.model, name), getattr(after.model, name)) for name in FIXED]
    remedy = "restore it, or choose another data_dir, where the log is learned anew"
    for name, was, becomes in pairs:
        if was != becomes:
            raise SchemaMismatch(
                f"{name} was {was!r} and is {becomes!r}: nothing learned can be carried over; {remedy}"
            )
    for name, less in (
        ("model.dim", after.model.dim < before.model.dim),
        ("bandit.clusters", after.explores and before.explores and after.bandit.clusters < before.bandit.clusters),
    ):
        if less:
            raise SchemaMismatch(f"{name} is smaller than what was learned with: it can only grow; {remedy}")


def _diff(old: Sequence[Any], new: Sequence[Any], what: Callable[[Any], str]) -> Iterator[Change]:
    for name in new:
        if name not in old:
            yield Change(f"added {what(name)}: starts at 0")
    for name in old:
        if name not in new:
            yield Change(f"removed {what(name)}: its rows and weights are dropped", loses=True)


def _slots(old: Schema, new: Schema) -> Iterator[Change]:
    def what(name: str) -> str:
        if "*" in name:
            return f"cross {name!r}"
        return (
            f"context field {name.removeprefix('context.')!r}" if name.startswith("context.") else f"attribute {name!r}"
        )

    yield from _diff(slot_names(old), slot_names(new), what)


def _counters(old: Schema, new: Schema) -> Iterator[Change]:
    renamed, was, becomes = renamed_numbers(old, new), counted(old.counters), counted(new.counters)
    halved = {(was[n].slots, was[n].half_life_s, becomes[m].half_life_s): None for n, m in renamed.items()}
    for slots, before_s, after_s in halved:
        yield Change(
            f"counter {'*'.join(slots)!r} halves every {after_s:g} s, not every {before_s:g} s: weights are kept"
        )
    before = [renamed.get(name, name) for name in old.numbers]
    come, gone = ([n for n in one if n not in other] for one, other in ((new.numbers, before), (before, new.numbers)))
    yield from (Change(f"added {text}: starts at 0") for text in _grouped(come, becomes, was))
    yield from (Change(f"removed {text}: its weights are dropped", loses=True) for text in _grouped(gone, was, becomes))
    if old.counters.smoothing != new.counters.smoothing:
        yield Change(f"features.counter_smoothing was {old.counters.smoothing:g} and is {new.counters.smoothing:g}")


def _grouped(numbers: Iterable[str], of: Mapping[str, Counted], other: Mapping[str, Counted]) -> list[str]:
    """One text for each counter and half-life that the other side does not have, and for each other number but those that say that
    one is missing."""
    texts: dict[str, None] = {}
    known = {(one.slots, one.half_life_s) for one in other.values()}
    for name in numbers:
        one = of.get(name)
        if one is not None and (one.slots, one.half_life_s) not in known:
            texts[f"counter {'*'.join(one.slots)!r} of {one.half_life_s:g} s"] = None
        elif not name.endswith(MISSING):
            texts[f"number {name!r}"] = None
    return list(texts)


def _history(old: Schema, new: Schema) -> Iterator[Change]:
    yield from _diff(
        [name for name, _ in old.item_fields[1 : old.num_history_fields]],
        [name for name, _ in new.item_fields[1 : new.num_history_fields]],
        lambda name: f"history attribute {name!r}",
    )
    yield from _diff(old.sequences, new.sequences, lambda kinds: f"sequence of {list(kinds) or 'all types'}")
    if old.history_len != new.history_len:
        text = f"features.history_len was {old.history_len} and is {new.history_len}"
        yield Change(text, loses=new.history_len < old.history_len)
    if old.time_gaps != new.time_gaps:
        yield Change(f"features.time_gaps is {str(new.time_gaps).lower()}", loses=old.time_gaps)
    widths = dict(old.item_fields)
    for name, width in new.item_fields:
        if width != widths.get(name, width):
            yield Change(f"attribute {name!r} has up to {width} values, had {widths[name]}", loses=width < widths[name])
    if old.crosses and new.crosses and old.cross_history != new.cross_history:
        text = f"features.cross_history was {old.cross_history} and is {new.cross_history}"
        yield Change(text, loses=new.cross_history < old.cross_history)


def _tasks(before: Config, after: Config) -> Iterator[Change]:
    old, new = ({task.name: task for task in config.tasks} for config in (before, after))
    yield from _diff(list(old), list(new), lambda name: f"task {name!r}")
    for name in old.keys() & new.keys():
        for option in ("group", "after"):
            was, becomes = getattr(old[name], option), getattr(new[name], option)
            if was != becomes:
                yield Change(
                    f"{option} of task {name!r} was {was!r} and is {becomes!r}: its predictions move", loses=True
                )
    if old.keys() != new.keys() and before.model.error_memory and after.model.error_memory:
        yield Change("model.error_memory begins anew: its keys are of all tasks", loses=True)
    if before.training.two_tower != after.training.two_tower:
        yield Change(f"training.two_tower is {str(after.training.two_tower).lower()}", loses=before.training.two_tower)
    if before.explores != after.explores:
        yield Change(f"there is {'a' if after.explores else 'no'} bandit", loses=before.explores)


def _model(before: Config, after: Config) -> Iterator[Change]:
    old, new = before.model, after.model
    if old.dim != new.dim:
        yield Change(f"model.dim was {old.dim} and is {new.dim}: what rows have more is 0")
    for name in ("calibrate", "error_memory", "row_l2"):
        was, becomes = bool(getattr(old, name)), bool(getattr(new, name))
        if was != becomes:
            yield Change(
                f"model.{name} is {'on and begins anew' if becomes else 'off, and what it knew is dropped'}", was
            )
    if old.dense_optimizer != new.dense_optimizer:
        yield Change(
            f"model.dense_optimizer was {old.dense_optimizer!r} and is {new.dense_optimizer!r}: moments begin anew"
        )


def _table(before: Config, after: Config) -> Iterator[Change]:
    old, new = before.table, after.table
    for name in ("admission", "precision", "rounding", "filter_counters"):
        was, becomes = getattr(old, name), getattr(new, name)
        if was != becomes:
            rounded = "; values are rounded to it" if name == "precision" and becomes != "float32" else ""
            yield Change(f"table.{name} was {was!r} and is {becomes!r}{rounded}")
