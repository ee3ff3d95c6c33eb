"""What the slate and filters cost: 20 positions from 500 candidates, rule by rule, and masks over a large catalogue."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from load_tests.common import Report, run, say
from recsys.config import parse
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.ranking import slate
from recsys.ranking.filter_rules import parse_filters
from recsys.ranking.request import Request
from recsys.ranking.rules import RuleBook
from recsys.types import Item, UserState

CANDIDATES, POSITIONS, TURNS = 500, 20, 500
CAPS = [{"attribute": "category", "most": 3}, {"attribute": "tags", "most": 2, "window": 5}]
BOOSTS = [{"filters": {"category": ["k1", "k2"]}, "times": 2.0}]
RULES: dict[str, dict[str, Any]] = {
    "off": {"draw_positions": []},
    "draw": {},
    "draw_all": {"draw_positions": "all"},
    "boosts": {"boosts": BOOSTS},
    "fatigue": {"fatigue": 0.3},
    "caps": {"caps": CAPS},
    "mmr": {"diversity": "mmr"},
    "dpp": {"diversity": "dpp"},
    "coverage": {"coverage": {"category": 0.3, "tags": 0.1}},
    "all": {
        "draw_positions": "all",
        "boosts": BOOSTS,
        "fatigue": 0.3,
        "caps": CAPS,
        "diversity": "dpp",
        "coverage": {"category": 0.3, "tags": 0.1},
        "pins": [{"position": 3, "item_id": "7"}],
    },
}
FILTERS: dict[str, dict[str, Any]] = {
    "value": {"category": "k1"},
    "set": {"tags": ["t1", "t2", "t3"]},
    "large_set": {"tags": [f"t{n}" for n in range(100)]},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=1_000_000)


def timed(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def measure(options: argparse.Namespace, report: Report) -> None:
    """Each rule alone, all together; each filter the first time, and again after a change of the catalogue."""
    rng = np.random.default_rng(options.seed)
    catalogue = Catalogue(Schema.of(parse({})), capacity=options.items)
    say(f"a catalogue of {options.items:,} items")
    kinds, tags = rng.integers(200, size=options.items), rng.integers(1000, size=(options.items, 3))
    for n in range(options.items):
        catalogue.apply(item(n, int(kinds[n]), tags[n].tolist()))
    rows = rng.choice(options.items, CANDIDATES, replace=False).astype(np.int32)
    rows[0] = 7
    for name, rules in RULES.items():
        say(f"slate: {name}")
        report.percentiles(f"slate_{name}", slates(catalogue, rules, rows, rng))
    for name, raw in FILTERS.items():
        say(f"filter: {name}")
        filters = parse_filters(raw, ("category", "tags"))
        report.add(f"filter_{name}_first", timed(lambda f=filters: catalogue.matching(f)), "ms")
        again = []
        for n in range(TURNS):
            catalogue.apply(item(n, n % 200, [n % 1000]))
            again.append(timed(lambda f=filters: catalogue.matching(f)))
        report.percentiles(f"filter_{name}_again", again)


def item(number: int, kind: int, tags: list[int]) -> Item:
    return Item(item_id=str(number), attributes={"category": f"k{kind}", "tags": [f"t{tag}" for tag in tags]})


def slates(catalogue: Catalogue, rules: dict[str, Any], rows: Any, rng: np.random.Generator) -> list[float]:
    """Milliseconds from scores to a filled slate, for a user who has seen 1,000 items, half of the candidates among them."""
    config = parse({"slate": rules})
    book = RuleBook(config, catalogue)
    seen = [*(catalogue.ids[row] for row in rows[: CANDIDATES // 2].tolist()), *(f"old-{n}" for n in range(750))]
    state = UserState(seen=tuple(seen), shown=((1000, 2),) * len(seen))
    masks, request = np.ones(len(rows), np.int64), Request(request_id="r", user_id="u")
    pins = {pin.position: int(rows[0]) for pin in config.slate.pins}

    def once(scores: Any, request_id: str) -> None:
        boosted = book.scores(scores, request, rows, ("trending",), masks)
        worth = book.worth(boosted, rows, state, 2000)
        choices = slate.fill(worth, POSITIONS, request_id, config.slate, book.rules(rows, pins))
        assert len(choices) == POSITIONS, "a slate that ends early costs less"

    asked = [(rng.random(len(rows)), f"r{n}") for n in range(TURNS)]
    return [timed(lambda one=one: once(*one)) for one in asked][TURNS // 10 :]


if __name__ == "__main__":
    raise SystemExit(run("slate", measure, arguments))
