"""One gradient step: what it changes, what it refuses, and the optimisers behind it."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import parse
from recsys.features.build import Features, UserFeatures
from recsys.features.schema import Schema
from recsys.model.layers import MLP, seeded
from recsys.model.layouts import layouts
from recsys.table.tables import Tables
from recsys.training.dense import CLIP_NORM, DenseOptimizer
from recsys.training.learner import Batch, Learner, regularise


def learner(**model: Any) -> Learner:
    config = parse(
        {
            "tasks": [
                {"name": "click", "types": ["click"], "group": "watch"},
                {"name": "like", "types": ["like"], "prior": 0.02},
            ],
            "model": {"dim": 4, "expert_hidden": [8, 4], "attention": [8], **model},
            "table": {"capacity": 20_000},
        }
    )
    schema = Schema.of(config)
    return Learner(config, schema, Tables(layouts(config, schema)))


def batch(of: Learner, seed: int = 0, size: int = 40) -> Batch:
    rng, schema = np.random.default_rng(seed), of._schema
    features = []
    for _ in range(size):
        shapes = (len(schema.shared_slots),), (4, len(schema.history_slots)), (1, len(schema.item_slots))
        shared, history, item = (rng.integers(0, 12, shape) for shape in shapes)
        user = UserFeatures(
            shared_keys=shared,
            shared_mask=np.ones(shared.shape, np.bool_),
            history_keys=history,
            history_mask=np.ones(history.shape, np.bool_),
            history_kinds=np.ones(4, np.uint8),
            history_gaps=np.zeros(4, np.uint8),
        )
        crosses = rng.integers(0, 50, (1, len(schema.cross_slots)))
        features.append(
            Features(
                user=user,
                item_keys=item,
                item_mask=np.ones(item.shape, np.bool_),
                cross_keys=crosses,
                cross_mask=np.ones(crosses.shape, np.bool_),
                numbers=rng.normal(size=(1, len(schema.numbers))).astype(np.float32),
            )
        )
    labels = np.array([[f.item_keys[0, 0] < 6, f.item_keys[0, 1] < 3] for f in features])
    return Batch(features=features, labels=labels, mask=np.ones((size, 2), np.bool_), first=True)


def everything(of: Learner) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Dense weights and every row."""
    found = {name: value.detach().numpy().copy() for name, value in of.model.named_parameters()}
    for name, table in of.tables.items():
        touched = table.touched("test")
        found[name] = table.lookup(touched.slots, touched.keys)[0]
    return found


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_learner_learns_what_decides_the_labels(optimizer: str) -> None:
    model = learner(dense_optimizer=optimizer, dense_learning_rate=0.01)
    for seed in range(60):
        assert model.learn(batch(model, seed), now_ms=seed) == ()
    test = batch(model, 1000, 200)
    found = model.predict(test.features)
    assert found[test.labels[:, 0], 0].mean() > 0.7 > 0.3 > found[~test.labels[:, 0], 0].mean()


@pytest.mark.parametrize("rows", ["adagrad", "adam"])
def test_rows_and_wide_weights_learn_by_the_optimiser_they_are_given(rows: str) -> None:
    model = learner(row_optimizer=rows, row_learning_rate=0.02, wide_optimizer="ftrl", wide_l1=2.0)
    assert {s.name: s.optimizer for s in model.tables["deep"].layout.segments} == {"deep": rows, "wide": "ftrl"}
    for seed in range(60):
        assert model.learn(batch(model, seed), now_ms=seed) == ()
    test = batch(model, 1000, 200)
    found = model.predict(test.features)
    assert found[test.labels[:, 0], 0].mean() > 0.6 > 0.4 > found[~test.labels[:, 0], 0].mean()
    touched = model.tables["wide"].touched("test")
    wide = model.tables["wide"].lookup(touched.slots, touched.keys)[0]
    assert 0.2 < (wide == 0).mean() < 1.0  # the L1 norm keeps what hardly matters at 0


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_its_task() -> None:
    model = learner()
    for seed in range(3):
        model.learn(batch(model, seed), now_ms=0)
    before = everything(model)
    with torch.no_grad():
        kept = model.model.home.towers[-1].weight[1].clone()
        model.model.home.towers[-1].weight[1] = torch.inf
    assert model.learn(batch(model, 1), now_ms=0) == ("like",)
    with torch.no_grad():
        model.model.home.towers[-1].weight[1] = kept
    after = everything(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert model.learn(batch(model, 1), now_ms=0) == ()
    assert any(not np.array_equal(before[name], value) for name, value in everything(model).items())


def test_flat_adam_is_adam_with_its_norm_bounded() -> None:
    ours, plain = (MLP([3, 5, 2], seeded(1)) for _ in range(2))
    optimizer, reference = DenseOptimizer(ours, "adam", 0.01), torch.optim.Adam(plain.parameters(), lr=0.01)
    x = torch.randn(7, 3, generator=seeded(2))
    for step in range(5):
        scale = 1e4 if step == 2 else 1.0
        optimizer.zero()
        reference.zero_grad()
        for model in (ours, plain):
            (scale * model(x)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP_NORM)
        optimizer.step()
        reference.step()
        if step == 3:
            again = MLP([3, 5, 2], seeded(9))
            other = DenseOptimizer(again, "adam", 0.01)
            again.load_state_dict(ours.state_dict())
            other.restore(optimizer.state())
            ours, optimizer = again, other
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("share", "norm"), [(1.0, CLIP_NORM), (1 / 256, 16 * CLIP_NORM)])
def test_the_bound_of_the_norm_grows_as_chance_does_in_smaller_batches(share: float, norm: float) -> None:
    for factor, bounded in ((0.99, 0.99), (3.0, 1.0)):
        optimizer = DenseOptimizer(torch.nn.Linear(3, 1), "adam", 0.01)
        optimizer.gradient.fill_(factor * norm / 2)  # of four numbers
        optimizer.step(share)
        assert optimizer.gradient.norm().item() == pytest.approx(bounded * norm)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_how_a_stream_is_cut_into_batches_hardly_changes_what_is_learned(kind: str) -> None:
    """256 examples a step, or 16, or 1: noisy regression ends at nearly the same weights; unscaled steps of 1 do not."""
    generator = seeded(3)
    x = torch.randn(256 * 60, 4, generator=generator)
    y = x @ torch.tensor([0.4, -0.2, 0.1, 0.0]) + 3 * torch.randn(len(x), generator=generator)

    def learned(size: int, share: float) -> torch.Tensor:
        model = torch.nn.Linear(4, 1)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = DenseOptimizer(model, kind, 0.01)  # type: ignore[arg-type]
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            optimizer.zero()
            (model(xs).squeeze(1) - ys).square().mean().backward()
            optimizer.step(share)
        return model.weight.detach()

    whole = learned(256, 1.0)
    for size in (16, 1):
        assert (learned(size, size / 256) - whole).abs().max() < 0.1
    if kind == "adam":
        assert (learned(1, 1.0) - whole).abs().max() > 0.2


def test_regulariser_sums_to_its_weight_over_the_occurrences() -> None:
    """With the row frozen and n final, one occurrence a batch: l2 w in all; rows that do not occur get none."""
    rows = np.array([[0.5, -2.0, 0.0, 7.0], [1.0, 1.0, 0.0, 3.0]], np.float32)
    total = np.zeros_like(rows)
    for _ in range(8):
        gradient = np.zeros_like(rows)
        regularise(gradient, rows, np.array([1, 0]), dim=2, l2=0.3)
        total += gradient
    np.testing.assert_allclose(total, [[0.15, -0.6, 0.0, -8.0], [0.0, 0.0, 0.0, 0.0]], rtol=1e-6)


def test_regulariser_counts_occurrences_in_the_row_and_shrinks_it() -> None:
    plain, shrunk = learner(), learner(row_l2=2.0)
    for seed in range(5):
        for model in (plain, shrunk):
            model.learn(batch(model, seed), now_ms=0)
    table = shrunk.tables["deep"]
    touched = table.touched("test")
    rows = table.lookup(touched.slots, touched.keys)[0]
    columns = sum(
        x.size for f in batch(shrunk).features for x in (f.user.shared_keys, f.user.history_keys, f.item_keys)
    )
    assert rows[:, -1].sum() == 5 * columns
    other = plain.tables["deep"].lookup(touched.slots, touched.keys)[0]
    assert np.square(rows[:, :4]).sum() < 0.9 * np.square(other[:, :4]).sum()
    with_count = shrunk.predict(batch(shrunk).features)
    assert np.isfinite(with_count).all()


def test_readings_describe_the_last_batch() -> None:
    model = learner()
    assert model.readings() == []
    model.learn(batch(model), now_ms=0)
    meta, task = model.readings()
    assert (meta.outputs, task.outputs) == (("shared", "watch", "inter"), ("click", "like"))
    assert (meta.scales > 0).all() and (task.gate_weights.sum(1) - 1).abs().max() < 1e-5
