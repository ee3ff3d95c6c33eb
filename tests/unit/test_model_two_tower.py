from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.model.layers import seeded
from recsys.model.learning_towers import TowerBatch, TowersLearning
from recsys.model.ranker import from_bytes, to_bytes
from recsys.model.specs import TwoTowerSpec
from recsys.model.two_tower import Passed, TwoTower
from recsys.training.dense import DenseOptimizer

SPEC = TwoTowerSpec(num_shared=1, num_item=3, num_history=2, dim=4, tower_dim=5, temperature=0.2)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def test_vectors_have_length_one_even_of_a_user_without_history() -> None:
    towers = TwoTower(SPEC, seed=0).eval()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    users = towers.user_vectors(torch.zeros(2, 1, 4), normal(1, 2, 3, 2, 4), mask)
    items = towers.item_vectors(normal(2, 7, 3, 4))
    torch.testing.assert_close(torch.cat([users, items]).norm(dim=1), torch.ones(9))


def test_history_is_averaged_by_recency_and_padding_is_ignored() -> None:
    towers = TwoTower(replace(SPEC, recency_decay=0.5), seed=0).eval()
    shared, history = normal(0, 1, 1, 4), normal(1, 1, 3, 2, 4)
    mean = (history[:, 0] + 0.25 * history[:, 2]) / 1.25
    expected = towers.user_vectors(shared, mean.unsqueeze(1), torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(towers.user_vectors(shared, history, torch.tensor([[True, False, True]])), expected)


def test_loss_is_the_published_one() -> None:
    user, item = (torch.nn.functional.normalize(normal(s, 6, 5), dim=1) for s in (1, 2))
    keys, log_q, reward = torch.tensor([1, 2, 1, 3, 4, 2]), -normal(3, 6).abs(), normal(4, 6).abs()
    u, v, total = user.double().numpy(), item.double().numpy(), 0.0
    for i in range(6):
        s = [np.exp(u[i] @ v[j] / 0.2 - log_q[j].item()) for j in range(6)]
        others = sum(s[j] for j in range(6) if keys[j] != keys[i])
        total -= reward[i].item() * np.log(s[i] / (s[i] + others)) / 6
    assert TwoTower(SPEC, seed=0).loss(user, item, keys, log_q, reward).item() == pytest.approx(total, rel=1e-5)


def test_equal_frequencies_leave_the_loss_unchanged() -> None:
    towers, user, item, keys = TwoTower(SPEC, seed=0), normal(1, 6, 5), normal(2, 6, 5), torch.arange(6)
    first, second = (towers.loss(user, item, keys, torch.full((6,), q), torch.ones(6)) for q in (0.0, -4.0))
    torch.testing.assert_close(first, second)


def test_id_dropout_is_replayed_from_saved_state() -> None:
    item = normal(1, 200, 3, 4)
    towers = TwoTower(SPEC, seed=3).train()
    towers.item_vectors(item)
    saved = to_bytes(towers)
    torch.manual_seed(1)
    expected = towers.item_vectors(item)
    other = TwoTower(SPEC, seed=3).train()
    from_bytes(other, saved)
    torch.manual_seed(2)
    torch.testing.assert_close(other.item_vectors(item), expected, atol=0, rtol=0)
    assert not torch.equal(other.item_vectors(item), expected)


def test_id_dropout_hides_only_ids_and_only_in_training() -> None:
    item = normal(1, 1000, 3, 4)
    towers = TwoTower(SPEC, seed=3)
    without = item.clone()
    without[:, 0] = 0
    plain, hidden = towers.eval().item_vectors(item), towers.item_vectors(without)
    vectors = towers.train().item_vectors(item)
    lost = (vectors - hidden).abs().amax(1) < 1e-6
    assert ((vectors - plain).abs().amax(1) < 1e-6).logical_xor(lost).all()
    assert 0.15 < lost.float().mean() < 0.25


def test_towers_learn_to_pair_and_place_a_new_item_by_its_metadata() -> None:
    towers = TwoTower(replace(SPEC, hidden=(32,)), seed=0).train()
    tastes = normal(1, 8, 4)
    items, generator = normal(2, 64, 3, 4), seeded(3)
    items[:, 1] = tastes[torch.arange(64) % 8]
    optimizer = torch.optim.Adam(towers.parameters(), lr=0.01)
    for _ in range(150):
        chosen = torch.randperm(64, generator=generator)[:32]
        liked = items[chosen][:, None, :2]
        user = towers.user_vectors(torch.zeros(32, 1, 4), liked, torch.ones(32, 1, dtype=torch.bool))
        optimizer.zero_grad()
        towers.loss(user, towers.item_vectors(items[chosen]), chosen, torch.zeros(32), torch.ones(32)).backward()
        optimizer.step()
    new = torch.zeros(8, 3, 4)
    new[:, 1], new[:, 2] = tastes, normal(4, 8, 4)
    towers.eval()
    user = towers.user_vectors(torch.zeros(64, 1, 4), items[:, None, :2], torch.ones(64, 1, dtype=torch.bool))
    best = (user @ towers.item_vectors(new).T).argmax(1)
    assert (best == torch.arange(64) % 8).float().mean() > 0.6


def test_equal_seeds_are_equal_bits_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = to_bytes(TwoTower(SPEC, seed=0))
    torch.manual_seed(2)
    assert first == to_bytes(TwoTower(SPEC, seed=0)) != to_bytes(TwoTower(SPEC, seed=1))


def test_interests_attend_as_published() -> None:
    towers = TwoTower(replace(SPEC, interests=3, recency_decay=0.7), seed=0).eval()
    shared, history = normal(0, 2, 1, 4), normal(1, 2, 4, 2, 4)
    mask = torch.tensor([[True, True, False, True], [False, False, False, False]])
    vectors = towers.user_vectors(shared, history, mask)
    assert vectors.shape == (2, 3, 5)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(2, 3))
    w1, w2 = towers.attention.detach().double().numpy(), towers.heads.detach().double().numpy()
    entries = history.flatten(2).double().numpy()[0]
    for interest in range(3):
        logits = np.array([w2[interest] @ np.tanh(w1 @ entry) for entry in entries])
        share = np.exp(logits) * 0.7 ** np.arange(4) * mask[0].numpy()
        mean = (share / share.sum()) @ entries
        inputs = torch.cat([shared[0].flatten(), torch.tensor(mean, dtype=torch.float32)])
        expected = torch.nn.functional.normalize(towers.user_tower(inputs[None]), dim=1)[0]
        torch.testing.assert_close(vectors[0, interest], expected, rtol=1e-4, atol=1e-5)


def test_the_interest_nearest_to_the_item_is_trained() -> None:
    towers = TwoTower(replace(SPEC, interests=2), seed=0)
    users, items = torch.nn.functional.normalize(normal(1, 6, 2, 5), dim=2), normal(2, 6, 5)
    best = [max(range(2), key=lambda k: float(users[i, k] @ items[i])) for i in range(6)]
    keys, log_q = torch.arange(6), torch.zeros(6)
    expected = towers.loss(users[torch.arange(6), best], items, keys, log_q, torch.ones(6))
    torch.testing.assert_close(towers.loss(users, items, keys, log_q, torch.ones(6)), expected)


def test_two_interests_hold_two_tastes_where_one_holds_the_middle() -> None:
    kinds = torch.nn.functional.normalize(normal(7, 8, 1, 4), dim=2)

    def items_of(kind: torch.Tensor, seed: int) -> torch.Tensor:
        """Items [n, 3, 4] of kinds [n]: their embedding is the kind's, and a little of their own."""
        return (kinds[kind] + 0.1 * normal(seed, len(kind), 1, 4)).expand(-1, 3, -1)

    def found(interests: int) -> float:
        """How near the nearest of a user's vectors lies to an item of either of their two kinds."""
        towers = TwoTower(replace(SPEC, interests=interests, recency_decay=1.0, id_dropout=0.0), seed=1)
        optimizer = torch.optim.Adam(towers.parameters(), lr=0.01)
        for step in range(401):
            generator = seeded(step)
            tastes = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(64)])
            history = items_of(tastes.repeat(1, 3).flatten(), step + 1000).view(64, 6, 3, 4)[:, :, :2]
            users = towers.user_vectors(torch.zeros(64, 1, 4), history, torch.ones(64, 6, dtype=torch.bool))
            sides = [towers.item_vectors(items_of(tastes[:, side], step)) for side in range(2)]
            side = torch.randint(2, (64,), generator=generator)
            item = torch.where((side == 0)[:, None], *sides)
            if step == 400:
                near = [(users.reshape(64, -1, 5) @ vectors.unsqueeze(2)).squeeze(2).amax(1) for vectors in sides]
                return float(torch.stack(near).detach().mean())
            keys = tastes[torch.arange(64), side]
            loss = towers.loss(users, item, keys, torch.zeros(64), torch.ones(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        raise AssertionError("unreachable")

    one, two = found(1), found(2)
    assert two > one + 0.05, f"{two} against {one}"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3]),
    st.integers(0, 3),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.5]),
)
def test_gradients_in_numpy_are_those_of_autograd(
    seed: int, interests: int, hard: int, size: int, dropout: float
) -> None:
    rng = np.random.default_rng(seed)
    spec = replace(SPEC, interests=interests, id_dropout=dropout, hidden=(6,) if seed % 2 else ())
    towers, other = TwoTower(spec, seed=3).train(), TwoTower(spec, seed=3)
    DenseOptimizer(other, "adam", 0.1)
    length, items = int(rng.integers(1, 5)), size * (1 + hard)
    shapes = (size, spec.num_shared * 4), (size, length, spec.num_history * 4), (items, spec.num_item * 4)
    shared, history, item = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    present, passed = rng.random((size, length)) < 0.7, rng.random((size, hard)) < 0.7
    keys, log_q = rng.integers(0, 4, size), -rng.random(size).astype(np.float32)
    inputs = [torch.from_numpy(a.copy()).requires_grad_() for a in (shared, history, item)]
    users = towers.user_vectors(
        inputs[0].view(size, -1, 4), inputs[1].view(size, length, -1, 4), torch.from_numpy(present)
    )
    vectors = towers.item_vectors(inputs[2].view(items, -1, 4))
    shown = Passed(vectors[size:].view(size, hard, -1), torch.from_numpy(passed)) if hard else None
    of_keys, of_q = torch.from_numpy(keys), torch.from_numpy(log_q)
    towers.loss(users, vectors[:size], of_keys, of_q, torch.ones(size), shown).backward()
    found = TowersLearning(other).gradients(TowerBatch(shared, history, present, item, keys, log_q, passed))
    for mine, theirs in zip(found, inputs, strict=True):
        np.testing.assert_allclose(mine, theirs.grad, rtol=1e-4, atol=1e-6)
    for (name, mine), theirs in zip(other.named_parameters(), towers.parameters(), strict=True):
        np.testing.assert_allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, err_msg=name)
    assert int(towers.steps) == int(other.steps)
