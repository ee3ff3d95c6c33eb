"""The policies that a log can be asked about: a small TOML or JSON file names one and its numbers."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recsys.errors import BadInput
from recsys.evaluation.off_policy import Float64, Rounds

OPTIONS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "logged": (),
    "greedy": ("by",),
    "epsilon_greedy": ("by", "epsilon"),
    "softmax": ("by", "temperature"),
    "fixed": ("probabilities",),
}
"""What each policy may be given."""
PROBABILITY = "probability"
"""Ranks by the log's own probability: where pools are drawn by a softmax of the score, that is the order of scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A policy over the pool of each round."""

    policy: str
    """uniform; logged (the log's own: its estimate must be the logged mean); greedy (the first of the best); epsilon_greedy
    (uniform with chance epsilon, else greedy); softmax (exp(value / temperature), normalised); fixed."""
    by: str = PROBABILITY
    """What to rank by: probability, score, the name of a logged prediction, or affinity in Open Bandit's files."""
    epsilon: float = 0.1
    temperature: float = 1.0
    """In units of the value; of its logarithm for by = "probability"."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """fixed: weights by item id, 0 for those not named, normalised within each pool."""

    def chances(self, rounds: Rounds) -> Float64:
        """The chance of each entry of each pool [M]; they sum to 1 in each. BadInput when the log lacks what it ranks by."""
        sizes = rounds.sizes.astype(np.float64)[rounds.round_of]
        if self.policy == "uniform":
            return 1 / sizes
        if self.policy == "fixed":
            given = np.array([self.probabilities.get(name, 0.0) for name in rounds.names])
            return self._normalised(given[rounds.items], rounds)
        values = self._values(rounds)
        if self.policy == "logged":
            return self._normalised(values, rounds)
        if self.policy == "softmax":
            logits = np.log(values) if self.by == PROBABILITY else values
            best = np.maximum.reduceat(logits, rounds.starts[:-1])[rounds.round_of]
            with np.errstate(over="ignore"):  # infinitely far behind the best: never taken
                return self._normalised(np.exp((logits - best) / self.temperature), rounds)
        greedy = np.zeros(len(values))
        best = np.maximum.reduceat(values, rounds.starts[:-1])[rounds.round_of]
        at_best = np.flatnonzero(values == best)
        _, first = np.unique(rounds.round_of[at_best], return_index=True)
        greedy[at_best[first]] = 1.0
        return greedy if self.policy == "greedy" else (1 - self.epsilon) * greedy + self.epsilon / sizes

    def _values(self, rounds: Rounds) -> Float64:
        known = {PROBABILITY: rounds.logged, **rounds.values}
        if self.by not in known:
            raise BadInput(f"by = {self.by!r} is not in this log: {_nearest(self.by, known)}", field="by")
        values = known[self.by]
        missing = np.flatnonzero(~np.isfinite(values))
        if len(missing):
            entry = int(missing[0])
            where = rounds.name(int(rounds.round_of[entry]))
            others = [name for name, found in known.items() if np.isfinite(found).all()]
            remedy = f"rank by {', '.join(others)}" if others else "use uniform or fixed, which need none"
            raise BadInput(
                f"{where}: item {rounds.names[rounds.items[entry]]!r} of the pool has no logged {self.by}: {remedy}",
                field="by",
            )
        return values

    def _normalised(self, weights: Float64, rounds: Rounds) -> Float64:
        totals = np.add.reduceat(weights, rounds.starts[:-1])
        if not totals.all():
            where = rounds.name(int(np.argmin(totals != 0)))
            raise BadInput(f"{where}: no item of the pool is among `probabilities`: name more", field="probabilities")
        normalised: Float64 = weights / totals[rounds.round_of]
        return normalised


def read_policy(path: Path) -> PolicyFile:
    """The policy of a .toml or .json file, checked; BadInput names the file, the field and the remedy."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise BadInput(
            f"policy file {str(path)!r} cannot be read ({error.strerror}): check it", field="policy"
        ) from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise BadInput(f"policy file {str(path)!r} is not {kind}: {error}", field="policy") from None
    try:
        return parse_policy(raw)
    except BadInput as error:
        raise BadInput(f"policy file {str(path)!r}: {error}", field=error.field) from None


def parse_policy(raw: Any) -> PolicyFile:
    """A policy from its file's table."""
    if not isinstance(raw, dict) or not isinstance(raw.get("policy"), str):
        raise BadInput(f'needs policy = "NAME", one of {", ".join(OPTIONS)}', field="policy")
    name = raw["policy"]
    if name not in OPTIONS:
        raise BadInput(f"policy {name!r} is not known: {_nearest(name, OPTIONS)}", field="policy")
    for key, value in raw.items():
        if key != "policy":
            if key not in OPTIONS[name]:
                allowed = f"it takes {', '.join(OPTIONS[name])}" if OPTIONS[name] else "it takes nothing else"
                raise BadInput(f"{key!r} is not an option of policy {name!r}: {allowed}", field=key)
            check, wanted = _CHECKS[key]
            if not check(value):
                raise BadInput(f"{key} = {value!r} must be {wanted}", field=key)
    if name == "fixed" and "probabilities" not in raw:
        raise BadInput("policy 'fixed' needs a table [probabilities] of item id = number", field="probabilities")
    return PolicyFile(**raw)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))


def _weights(value: Any) -> bool:
    return (
        isinstance(value, dict) and all(_number(v) and 0 <= v <= 1e300 for v in value.values()) and any(value.values())
    )


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "by": (lambda v: isinstance(v, str), "the name of a logged number"),
    "epsilon": (lambda v: _number(v) and 0 <= v <= 1, "from 0 to 1"),
    "temperature": (lambda v: _number(v) and v > 0, "above 0"),
    "probabilities": (_weights, "a table of item id = number from 0 to 1e300, not all 0"),
}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"did you mean {near!r}? Known: {', '.join(known)}"
