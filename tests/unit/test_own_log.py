"""The log that production writes tells what another policy would have earned."""

import numpy as np

from recsys.config import parse
from recsys.evaluation.off_policy import draws_of, ips, snips
from recsys.events import messages
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.ranking.parameters import ParameterStore
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.sources import Sources
from recsys.state.memory import MemoryState
from recsys.testing.world import World
from recsys.types import Impression, ShownItem

POSITION, REQUESTS = 2, 1500


def test_ips_and_snips_of_the_drawn_position_find_the_true_value() -> None:
    """Target: always the pool's best-liked item. Both 99% intervals hold the truth; a right estimator fails once in 100 worlds."""
    config = parse(
        {"ranking": {"draw_position": POSITION, "draw_pool": 6, "draw_temperature": 5.0, "draw_floor": 0.019}}
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
    rewards: dict[tuple[str, str], float] = {}
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
            rewards[request_id, drawn.item_id] = 1.0

    def best_liked(impression: Impression, drawn: ShownItem) -> list[float]:
        assert drawn.pool is not None
        liked = world.probability(users[impression.request_id], [item_id for item_id, _ in drawn.pool])
        return [float(place == liked.argmax()) for place in range(len(liked))]

    draws = draws_of(log, rewards, best_liked, position=POSITION)
    logged = np.mean([rewards.get((i.request_id, i.items[POSITION - 1].item_id), 0.0) for i in log])
    for estimator in (ips, snips):
        estimate = estimator(draws, np.random.default_rng(1), confidence=0.99)
        assert estimate.low <= np.mean(truth) <= estimate.high
        assert estimate.low > logged, "the best-liked item earns clearly more than a random one"
