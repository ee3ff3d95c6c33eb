import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.errors import SchemaMismatch
from recsys.model.layers import seeded
from recsys.model.ranker import Ranker, RankerInputs, from_bytes, losses, to_bytes
from recsys.model.specs import RankerSpec
from tests.unit.test_model_din import form

SPEC = RankerSpec(
    num_shared=2,
    num_item=3,
    num_history=2,
    history_len=5,
    dim=4,
    num_numbers=3,
    tasks=("click", "like"),
    groups=("inter", "inter"),
    number_prior=(0.5, 0.0, -2.0),
    task_prior=(0.05, 0.01),
    expert_hidden=(8, 6),
    feature_gate_rank=2,
)


def inputs(items: int = 40, requests: int = 4) -> RankerInputs:
    generator = seeded(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return RankerInputs(
        shared=normal(requests, 2, 4),
        history=normal(requests, 5, 2, 4),
        history_masks=torch.rand(1, requests, 5, generator=generator) < 0.7,
        history_gaps=torch.randint(32, (requests, 5), generator=generator),
        item=normal(items, 3, 4),
        numbers=normal(items, 3),
        wide=normal(items, 2),
        request=torch.arange(items) * requests // items,
    )


def trained(steps: int = 30, spec: RankerSpec = SPEC) -> Ranker:
    model = Ranker(spec, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = inputs()
    labels = (batch.item[:, 0, :2] > 0).float()
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model(batch), labels, torch.ones(40, 2, dtype=torch.bool), torch.ones(40, 2)).sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("requests", [1, 4])
def test_compiled_and_op_by_op_agree(requests: int, compiled: bool) -> None:
    model, batch = trained(), inputs(requests=requests)
    with form(compiled), torch.inference_mode():
        served = model(batch)
    torch.testing.assert_close(served, model(batch), atol=1e-5, rtol=1e-5)


def test_a_chained_task_is_the_product_of_the_shares_before_it() -> None:
    spec = replace(
        SPEC,
        tasks=("a", "b", "c", "d"),
        groups=("x",) * 4,
        task_prior=(0.4, 0.2, 0.3, 0.05),
        after=(-1, 0, -1, 1),
        number_prior=(0.0,) * 3,
    )
    model = Ranker(spec, seed=0).double()
    logits = torch.randn(50, 4, generator=seeded(1), dtype=torch.float64).mul(4).requires_grad_()
    s = 1 / (1 + np.exp(-logits.detach().numpy()))
    expected = np.stack([s[:, 0], s[:, 0] * s[:, 1], s[:, 2], s[:, 0] * s[:, 1] * s[:, 3]], 1)
    torch.testing.assert_close(model.probabilities(logits), torch.from_numpy(expected), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        model.probabilities(model.bias.expand(1, -1)).float(), torch.tensor([[0.4, 0.2, 0.3, 0.05]])
    )
    labels = torch.from_numpy((np.random.default_rng(2).random((50, 4)) < 0.4).astype(float))
    each = losses(model.log_odds(logits), labels, torch.ones(50, 4, dtype=torch.bool), torch.ones(50, 4))
    y = labels.numpy()
    entropy = -(y * np.log(expected) + (1 - y) * np.log1p(-expected)).mean(0)
    torch.testing.assert_close(each, torch.from_numpy(entropy), atol=1e-5, rtol=1e-5)
    extreme = torch.tensor([[60.0, 60.0, -60.0, -60.0], [-60.0, -60.0, 60.0, 60.0]], requires_grad=True)
    losses(
        model.log_odds(extreme), torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4)
    ).sum().backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()


@pytest.mark.parametrize("training", [False, True])
def test_untrained_model_is_the_prior(training: bool) -> None:
    batch = inputs()
    prior = (
        torch.logit(torch.tensor([0.05, 0.01])) + (batch.numbers @ torch.tensor([0.5, 0.0, -2.0]))[:, None] + batch.wide
    )
    torch.testing.assert_close(Ranker(SPEC, seed=1).train(training)(batch), prior)


def test_equal_seeds_are_equal_bits_whatever_the_global_generator() -> None:
    models = []
    for seed, globally in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(globally)
        state = torch.get_rng_state()
        models.append(to_bytes(Ranker(SPEC, seed=seed)))
        assert torch.equal(torch.get_rng_state(), state)
    assert models[0] == models[1] != models[2]


def test_another_process_builds_equal_bits() -> None:
    code = (
        "import torch; torch.manual_seed(123); torch.rand(7)\n"
        "import hashlib; from tests.unit.test_model_ranker import SPEC, Ranker, to_bytes\n"
        "print(hashlib.sha256(to_bytes(Ranker(SPEC, seed=1))).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(to_bytes(Ranker(SPEC, seed=1))).hexdigest()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("input_width", [0, 5])
def test_one_batch_of_requests_equals_each_request_alone(input_width: int, compiled: bool) -> None:
    model, batch = trained(spec=replace(SPEC, input_width=input_width)), inputs()
    with form(compiled), torch.inference_mode():
        together = model(batch)
        for request in range(4):
            rows = batch.request == request
            alone = replace(
                batch,
                shared=batch.shared[request, None],
                history=batch.history[request, None],
                history_masks=batch.history_masks[:, request, None],
                history_gaps=batch.history_gaps[request, None],
                item=batch.item[rows],
                numbers=batch.numbers[rows],
                wide=batch.wide[rows],
                request=torch.zeros(int(rows.sum()), dtype=torch.int64),
            )
            torch.testing.assert_close(model(alone), together[rows], atol=1e-5, rtol=1e-5)


def test_each_sequence_is_attended_to_on_its_own() -> None:
    spec, batch = replace(SPEC, sequences=2), inputs()
    model = Ranker(spec, seed=1).eval()
    with torch.no_grad():
        model.home.towers[-1].weight.normal_(generator=seeded(1))
    first, none = batch.history_masks, torch.zeros_like(batch.history_masks)
    logits = [
        model(replace(batch, history_masks=torch.cat(masks)))
        for masks in ((first, none), (none, first), (first, first))
    ]
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    moved = replace(batch, history=torch.where(first[0, :, :, None, None], batch.history, 9.0))
    torch.testing.assert_close(model(replace(moved, history_masks=torch.cat([first, none]))), logits[0])


def test_serving_in_parts_equals_serving_at_once() -> None:
    model, batch = trained(), inputs(items=600, requests=1)
    with torch.inference_mode():
        whole = model(batch)
        last = replace(
            batch, item=batch.item[-5:], numbers=batch.numbers[-5:], wide=batch.wide[-5:], request=batch.request[-5:]
        )
        torch.testing.assert_close(model(last), whole[-5:], atol=1e-5, rtol=1e-5)


def test_model_learns_what_the_prior_cannot_say() -> None:
    batch, mask = inputs(), torch.ones(40, 2, dtype=torch.bool)
    labels = (batch.item[:, 0, :2] > 0).float()
    before, after = (
        losses(model(batch), labels, mask, torch.ones(40, 2)).sum()
        for model in (Ranker(SPEC, seed=1).eval(), trained(150))
    )
    assert after < 0.5 * before


def test_gradients_reach_every_row() -> None:
    model, batch = trained().train(), inputs()
    tensors = [batch.shared, batch.history, batch.item, batch.wide]
    for tensor in tensors:
        tensor.requires_grad_()
    losses(model(batch), torch.ones(40, 2), torch.ones(40, 2, dtype=torch.bool), torch.ones(40, 2)).sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
    assert (batch.item.grad != 0).flatten(1).any(1).all()
    assert ((batch.history.grad != 0).flatten(2).any(2) == batch.history_masks[0]).all()


def test_loss_is_masked_weighted_cross_entropy_over_items() -> None:
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.1]], requires_grad=True)
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    mask, weights = torch.tensor([[True, False], [True, True]]), torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    p = torch.sigmoid(logits.detach())
    expected = torch.stack([-p[0, 0].log() - 3 * (1 - p[1, 0]).log(), -2 * p[1, 1].log()]) / 2
    value = losses(logits, labels, mask, weights)
    torch.testing.assert_close(value.detach(), expected)
    value.sum().backward()
    assert logits.grad is not None and logits.grad[0, 1] == 0 and torch.isfinite(logits.grad).all()


def test_bytes_carry_weights_and_statistics() -> None:
    model, other = trained(), Ranker(SPEC, seed=9).eval()
    from_bytes(other, to_bytes(model))
    with torch.inference_mode():
        assert torch.equal(model(inputs()), other(inputs()))


@pytest.mark.parametrize("change", [{"dim": 8}, {"experts": 3}, {"groups": ("inter", "watch")}, {"tower_hidden": ()}])
def test_weights_of_another_configuration_are_refused_whole(change: dict[str, object]) -> None:
    other = Ranker(replace(SPEC, **change), seed=1)
    before = to_bytes(other)
    with pytest.raises(SchemaMismatch, match="one configuration"):
        from_bytes(other, to_bytes(trained(1)))
    assert to_bytes(other) == before


def test_torn_weights_are_refused() -> None:
    with pytest.raises(SchemaMismatch, match="safetensors"):
        from_bytes(Ranker(SPEC, seed=1), to_bytes(Ranker(SPEC, seed=1))[:50])


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="number_prior has 1"):
        replace(SPEC, number_prior=(1.0,))
    with pytest.raises(ValueError, match="num_history"):
        replace(SPEC, num_history=4)
