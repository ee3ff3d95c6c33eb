"""The log that production writes tells what another policy would have earned."""

from itertools import pairwise

import numpy as np

from recsys.candidates.sources import Sources
from recsys.config import parse
from recsys.evaluation.off_policy import Settings, importance, smoothed_means, terms_of
from recsys.evaluation.off_policy_intervals import estimates
from recsys.evaluation.off_policy_logs import Log, rounds_of
from recsys.evaluation.off_policy_slates import slate_terms_of, slates_of, to_the_end
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.parameters.store import ParameterStore
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.state.memory_state import MemoryState
from recsys.testing.world import World
from recsys.types import Impression

POSITION, REQUESTS = 2, 1500


def test_estimators_of_the_drawn_position_find_the_true_value() -> None:
    """Target: always the pool's best-liked item. Each 99% interval holds the truth; a right estimator fails once in 100 worlds."""
    config = parse(
        {"slate": {"draw_positions": [POSITION], "draw_pool": 6, "draw_temperature": 5.0, "draw_floor": 0.019}}
    )
    schema, world = Schema.of(config), World(seed=3, num_users=30, num_items=80, bias=-0.5)
    sources = Sources(config, schema, Catalogue(schema))
    for item in world.items():
        sources.item(item)
    scorer = Scorer(config, schema, ParameterStore(layouts(config, schema), schema.hash))
    pipeline = Pipeline(config, schema, MemoryState(50, 1000), sources, scorer, None)
    rng = np.random.default_rng(0)
    log: list[Impression] = []
    users: dict[str, int] = {}
    rewarded: set[tuple[str, str]] = set()
    truth = []
    for number in range(REQUESTS):
        user, request_id = world.any_user(), f"r{number}"
        candidates = tuple(f"item-{n}" for n in rng.choice(80, 10, replace=False))
        answer = pipeline.recommend(
            Request(request_id=request_id, user_id=world.users[user], n=4, candidates=candidates), number
        )
        impression = messages.parse_impression(messages.dump_impression(answer.impression))
        log.append(impression)
        users[request_id] = user
        drawn = impression.items[POSITION - 1]
        assert drawn.pool is not None
        truth.append(world.probability(user, [i for i, _ in drawn.pool]).max())
        if world.clicks(user, [drawn.item_id])[0]:
            rewarded.add((request_id, drawn.item_id))

    rounds = rounds_of(Log(impressions=log, rewarded=rewarded), POSITION)
    chances = np.zeros(len(rounds.items))
    for number, (first, end) in enumerate(pairwise(rounds.starts)):
        liked = world.probability(users[rounds.requests[number]], [rounds.names[i] for i in rounds.items[first:end]])
        chances[first + liked.argmax()] = 1.0
    model = smoothed_means(rounds)
    terms = {name: terms_of(name, rounds, chances, model, Settings()) for name in ("ips", "snips", "dr", "sndr")}
    found = estimates(
        terms, importance(rounds, chances), rounds.rewards, rounds.users, np.random.default_rng(1), confidence=0.99
    )
    for estimate in found:
        assert estimate.bootstrap is not None
        low, high = estimate.bootstrap
        assert low <= np.mean(truth) <= high
        assert low > rounds.rewards.mean(), "the best-liked item earns clearly more than a random one"


def test_estimators_of_whole_answers_find_the_true_value_of_another_draw_under_rules() -> None:
    """Every position drawn among what caps and likeness leave; target: the same rules with uniform draws, whose value is simulated.

    Each 99% interval holds the truth; a right estimator fails once in 100 worlds.
    """
    rules = {
        "draw_positions": "all",
        "draw_pool": 4,
        "diversity": "mmr",
        "caps": [{"attribute": "category", "most": 2}],
    }
    world = World(seed=4, num_users=30, num_items=60, num_kinds=6, bias=-0.5)

    def answers(requests: int, **draw: object) -> tuple[Log, list[float]]:
        config = parse({"slate": {**rules, **draw}})
        schema = Schema.of(config)
        sources = Sources(config, schema, Catalogue(schema))
        for item in world.items():
            sources.item(item)
        scorer = Scorer(config, schema, ParameterStore(layouts(config, schema), schema.hash))
        pipeline = Pipeline(config, schema, MemoryState(50, 1000), sources, scorer, None)
        rng = np.random.default_rng(0)
        log, rewarded, values = [], set(), []
        for number in range(requests):
            user, request_id = world.any_user(), f"r{number}"
            candidates = tuple(f"item-{n}" for n in rng.choice(60, 12, replace=False))
            request = Request(request_id=request_id, user_id=world.users[user], n=3, candidates=candidates)
            log.append(pipeline.recommend(request, number).impression)
            shown = [item.item_id for item in log[-1].items]
            values.append(float(world.probability(user, shown).sum()))
            for item_id, clicked in zip(shown, world.clicks(user, shown), strict=True):
                if clicked:
                    rewarded.add((request_id, item_id))
        return Log(impressions=log, rewarded=rewarded), values

    log, _ = answers(1500, draw_temperature=0.8, draw_floor=0.019)
    _, truth = answers(1500, draw_kind="epsilon", draw_epsilon=1.0)
    slates = slates_of(log)
    chances = np.repeat(1.0 / np.diff(slates.rounds.starts), np.diff(slates.rounds.starts))
    model = to_the_end(slates, chances)
    terms = {name: slate_terms_of(name, slates, chances, model) for name in ("slate_ips", "cascade_ips", "cascade_dr")}
    rewards = slates.grid(slates.rounds.rewards, 0.0).sum(1)
    for estimate in estimates(
        terms, np.zeros(len(rewards)), rewards, slates.users, np.random.default_rng(1), confidence=0.99
    ):
        assert estimate.bootstrap is not None
        low, high = estimate.bootstrap
        assert low <= np.mean(truth) <= high
        assert high - low < 0.5
