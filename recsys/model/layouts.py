"""From the configuration to table layouts: one place, so that trainer, parameter and ranking agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from recsys import capacity
from recsys.config import BanditConfig, Config
from recsys.errors import ConfigError
from recsys.features.schema import Schema
from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.rows import initial_state

SPARE = 0.1
"""Share of each table that is kept free for what comes next: half holds a twentieth more rows, and a burst of new keys finds no
room twice as soon."""
ENTRY_BYTES = 24
"""Of a row beside its values and optimiser state: docs/table.md."""
PENDING_BYTES = 48
"""Of the exact count of a key that has no row yet."""
MOST_ROWS = 2**28 - 2**16


def layouts(config: Config, schema: Schema, order: int | None = None) -> tuple[Layout, ...]:
    """`deep`: embedding, one wide weight a task, and with `row_l2` a count; `wide`: crosses (or one unused slot); `tower`: the
    two-tower model's own embeddings; `edge`: the bandit's sums, where it is a source. Each has room for `table.capacity` rows, or
    for as many as fit its share of `capacity.memory_bytes`. `order`: see `Layout`."""
    model, policy = config.model, SlotPolicy(admission=config.table.admission, expiry_s=config.table.expiry_s)
    deep = Segment(
        name="deep",
        dim=model.dim,
        optimizer=model.row_optimizer,
        learning_rate=model.row_learning_rate,
        init_scale=model.init_scale,
    )
    if model.row_l2 and config.table.precision != "float32":
        raise ConfigError(
            f"model.row_l2 counts how often a row occurred, which {config.table.precision} cannot: set table.precision "
            'to "float32", or model.row_l2 to 0'
        )
    # How often a row occurred in training, for the mini-batch aware L2: gradients of minus that, at a rate of 1.
    seen = (Segment(name="seen", dim=1, optimizer="sgd", learning_rate=1.0),) if model.row_l2 else ()
    wide = Segment(
        name="wide",
        dim=len(schema.tasks),
        optimizer=model.wide_optimizer,
        learning_rate=model.wide_learning_rate,
        l1=model.wide_l1,
        l2=model.wide_l2,
    )

    def layout(name: str, segments: tuple[Segment, ...], slots: tuple[int, ...]) -> Layout:
        return Layout(
            name=name,
            segments=segments,
            slots=dict.fromkeys(slots, policy),
            seed=config.seed,
            precision=config.table.precision,
            rounding="nearest" if config.table.precision == "float32" else config.table.rounding,
            filter_counters=config.table.filter_counters if config.table.admission > 1 else 0,
        )

    made = (
        layout("deep", (deep, wide, *seen), schema.deep_slots),
        layout("wide", (wide,), schema.wide_slots or (len(schema.slots),)),
        layout("tower", (deep,), schema.deep_slots),
        *((edges(config.bandit, 1),) if config.explores else ()),
    )
    return tuple(replace(each, capacity=rows_of(config, each), spare=SPARE, order=order) for each in made)


def parameters_name(config: Config, schema: Schema | None = None) -> str:
    """Names what parameters mean between processes: the slot list, and how wide the rows are."""
    schema = schema or Schema.of(config)
    return ".".join([schema.hash, "-".join(str(made.dim) for made in layouts(config, schema))])


def same_parameters(one: str, other: str) -> bool:
    """Whether two names are of one thing; releases of before said the slot list alone."""
    (hashed, _, widths), (with_hash, _, with_widths) = one.partition("."), other.partition(".")
    return hashed == with_hash and (not widths or not with_widths or widths == with_widths)


def rows_of(config: Config, layout: Layout) -> int:
    """Rows that a table may hold."""
    if config.table.capacity:
        return config.table.capacity
    return min(capacity.entries(config.capacity.memory_bytes, layout.name, row_bytes(layout)), MOST_ROWS)


def row_bytes(layout: Layout) -> int:
    """Bytes of a row, its optimiser state and its part of the index; and of a key waiting for one, where such are counted."""
    value = np.dtype(np.float32 if layout.precision == "float32" else np.float16).itemsize
    waits = not layout.filter_counters and max(policy.admission for policy in layout.slots.values()) > 1
    return value * layout.dim + initial_state(layout).nbytes + ENTRY_BYTES + PENDING_BYTES * waits


def sizes(made: Iterable[Layout]) -> str:
    """What each table may hold, for the log."""
    return ", ".join(
        f"{each.name} {each.capacity:,} rows of {row_bytes(each)} bytes ({each.capacity * row_bytes(each) / 1e6:,.0f} MB)"
        for each in made
    )


def edges(bandit: BanditConfig, capacity: int) -> Layout:
    """An edge is a row: its slot is its cluster's place, its key the item's, its values the sums d, n and b.

    A gradient step at rate 1 adds: minus what is to be added is the gradient.
    """
    return Layout(
        name="edge",
        segments=(Segment(name="sums", dim=3, optimizer="sgd", learning_rate=1.0),),
        slots=dict.fromkeys(range(bandit.clusters), SlotPolicy(expiry_s=bandit.expiry_s)),
        capacity=capacity,
    )
