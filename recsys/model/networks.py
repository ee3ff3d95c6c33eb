"""From the configuration to networks: one place, so that trainer and ranking agree."""

from __future__ import annotations

from recsys.config import Config
from recsys.features.build import GAP_BUCKETS
from recsys.features.schema import Schema
from recsys.model.ranker import Ranker, RankerSpec
from recsys.model.two_tower import TwoTower, TwoTowerSpec


def ranker(config: Config, schema: Schema) -> Ranker:
    """The untrained ranker: bit-equal in every process with one configuration."""
    model = config.model
    priors = {"popularity": model.popularity_prior, "covisit": model.covisit_prior, "follows.mixed": 1.0}
    num_affinities = max(1, schema.num_history_fields - 1)

    def prior(name: str) -> float:
        if name.startswith("affinity."):
            return model.affinity_prior / num_affinities
        if name.startswith("rate.") and "*" not in name:  # a rate of user or item, spread over the half-lives
            return 0.5 / len(schema.counters.half_lives_s)
        return priors.get(name, 0.0)

    spec = RankerSpec(
        num_shared=len(schema.shared_slots),
        num_item=len(schema.item_fields),
        num_history=schema.num_history_fields,
        history_len=schema.history_len,
        dim=model.dim,
        num_numbers=len(schema.numbers),
        tasks=schema.tasks,
        groups=tuple(task.group for task in config.tasks),
        attention=model.attention,
        activation=model.attention_activation,
        softmax=model.attention_softmax,
        sequences=len(schema.sequences),
        gaps=GAP_BUCKETS if schema.time_gaps else 0,
        input_width=model.input_width,
        experts=model.experts,
        expert_hidden=model.expert_hidden,
        tower_hidden=model.tower_hidden,
        feature_gate_rank=model.feature_gate_rank,
        home_without=model.home_without,
        calibrate=model.calibrate,
        error_memory=model.error_memory,
        number_prior=tuple(prior(name) for name in schema.numbers),
        task_prior=tuple(task.prior for task in config.tasks),
        odd_numbers=tuple(range(schema.first_declared, schema.first_declared + 2 * len(schema.declared), 2)),
        after=tuple(schema.tasks.index(task.after) if task.after else -1 for task in config.tasks),
    )
    return Ranker(spec, seed=config.seed)


def two_tower(config: Config, schema: Schema) -> TwoTower:
    """The untrained retrieval towers."""
    spec = TwoTowerSpec(
        num_shared=len(schema.shared_slots),
        num_item=len(schema.item_fields),
        num_history=schema.num_history_fields,
        dim=config.model.dim,
        tower_dim=config.model.tower_dim,
        temperature=config.model.temperature,
        interests=config.model.interests,
    )
    return TwoTower(spec, seed=config.seed)
