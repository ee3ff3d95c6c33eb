"""What a checkpoint was made of: the sections of the configuration that give its rows and weights their meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from recsys.config import Config, parse
from recsys.errors import ConfigError, SchemaMismatch
from recsys.features.schema import Schema
from recsys.model.layouts import layouts, parameters_name

SECTIONS = ("seed", "catalogue", "features", "tasks", "model", "table", "training", "retrieval", "feedback", "bandit")
FIXED = (
    "attention",
    "attention_activation",
    "attention_softmax",
    "input_width",
    "experts",
    "expert_hidden",
    "tower_hidden",
    "feature_gate_rank",
    "home_without",
    "tower_dim",
    "interests",
    "row_optimizer",
    "wide_optimizer",
)
"""Of section `model`: no weights of one value have a meaning with another."""
MOST_EARLIER = 8
"""So many slot lists of before are known: half forgets what a log of a week may hold after a day of trials, double doubles a few kB."""
REMEDY = (
    "see what would be kept with `recsys checkpoint migrate --dry-run`, then migrate, or restore the old configuration"
)


class Outgrown(SchemaMismatch):
    """A checkpoint was made with another configuration, `before`; it can be carried over."""

    def __init__(self, message: str, before: Config) -> None:
        super().__init__(message)
        self.before = before


def describe(config: Config) -> dict[str, Any]:
    """The sections, as JSON-able values."""
    return config.model_dump(mode="json", include=set(SECTIONS))


def unit(config: Config) -> dict[str, Any]:
    """The fields of a manifest that say so."""
    return {"schema": Schema.of(config).hash, "parameters": parameters_name(config), "made_of": describe(config)}


def described(said: Mapping[str, Any], config: Config) -> Config:
    """The configuration with these sections; ConfigError where this release does not know what they say."""
    known = parse({name: said[name] for name in SECTIONS if name in said})  # the rest may name what they do not have
    return config.model_copy(update={name: getattr(known, name) for name in SECTIONS})


def shape(config: Config) -> dict[str, Any]:
    """What rows and weights depend on: with another one a checkpoint does not fit as it is."""
    model, schema = config.model, Schema.of(config)
    return {
        "schema": schema.hash,
        "tables": [
            (
                made.name,
                [(segment.name, segment.dim, segment.optimizer) for segment in made.segments],
                {slot: policy.admission for slot, policy in made.slots.items()},
                (made.precision, made.rounding, made.filter_counters, made.seed if made.filter_counters else 0),
            )
            for made in layouts(config, schema)
        ],
        "model": [getattr(model, name) for name in (*FIXED, "calibrate", "dense_optimizer")],
        "error_memory": bool(model.error_memory),
        "tasks": [(task.name, task.group, task.after) for task in config.tasks],
        "two_tower": config.training.two_tower,
    }


def mark(config: Config) -> str:
    """Names the shape in the journal."""
    said = orjson.dumps(shape(config), option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(said, digest_size=8).hexdigest()


def check(what: str, manifest: Mapping[str, Any], config: Config) -> None:
    """That a checkpoint fits the configuration. Outgrown when it was made with another one that is known, else SchemaMismatch."""
    said, own = manifest.get("made_of"), Schema.of(config).hash
    if said is None:
        if manifest.get("schema") != own:
            raise SchemaMismatch(
                f"{what} was written with schema {manifest.get('schema')}, the configuration makes {own}, and the release that wrote it did "
                "not say what that was: start once with the old catalogue, features and tasks, so that the next checkpoint says so, then "
                "change them"
            )
        return
    try:
        before = described(said, config)
    except ConfigError as error:
        raise SchemaMismatch(f"{what} was made by a release that this one does not follow ({error})") from None
    if shape(before) != shape(config):
        raise Outgrown(f"{what} was made with another configuration: {REMEDY}", before)


def schemas(said: Sequence[Mapping[str, Any]], config: Config) -> dict[str, Schema]:
    """Slot lists by hash, of configurations of before; what this release cannot read is left out."""
    found = {}
    for each in said:
        try:
            schema = Schema.of(described(each, config))
        except ConfigError:
            continue
        found[schema.hash] = schema
    return found
