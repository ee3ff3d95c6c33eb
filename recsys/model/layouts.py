"""From the configuration to table layouts: one place, so that trainer, parameter and ranking agree."""

from __future__ import annotations

from recsys.config import BanditConfig, Config
from recsys.errors import ConfigError
from recsys.features.schema import Schema
from recsys.table.base import Layout, Segment, SlotPolicy


def layouts(config: Config, schema: Schema) -> tuple[Layout, ...]:
    """`deep`: embedding, one wide weight a task, and with `row_l2` a count; `wide`: crosses (or one unused slot); `tower`: the
    two-tower model's own embeddings; `edge`: the bandit's sums, where it is a source."""
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
            capacity=config.table.capacity,
            seed=config.seed,
            precision=config.table.precision,
            rounding="nearest" if config.table.precision == "float32" else config.table.rounding,
            filter_counters=config.table.filter_counters if config.table.admission > 1 else 0,
        )

    return (
        layout("deep", (deep, wide, *seen), schema.deep_slots),
        layout("wide", (wide,), schema.wide_slots or (len(schema.slots),)),
        layout("tower", (deep,), schema.deep_slots),
        *((edges(config.bandit, config.table.capacity),) if config.explores else ()),
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
