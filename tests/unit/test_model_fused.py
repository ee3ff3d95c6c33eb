"""The fused operations: the same values as op by op, and gradients as float64 differences say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from recsys.model import eager, fused, fused_kernels, plan
from recsys.model.layers import Dice, StreamingNorm, seeded

GENERATOR = seeded(4)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


RUNNING = torch.stack([normal(3, 4), normal(3, 4).abs() + 0.5])
Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Case] = {
    "norm and Swish": (
        lambda *tensors: fused.NormSilu.apply(*tensors, RUNNING, None),
        lambda *tensors: eager.norm_silu(*tensors, RUNNING),
        (normal(3, 6, 4), normal(3, 1, 4), normal(3, 1, 4)),
    ),
    "Dice": (
        lambda *tensors: fused.Dice.apply(*tensors, RUNNING[:, 0], None),
        lambda *tensors: eager.dice(*tensors, RUNNING[:, 0]),
        (normal(6, 4), normal(4)),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_equals_op_by_op(case: Case) -> None:
    torch.testing.assert_close(case[0](*case[2]), case[1](*case[2]))
    single = [tensor.float() for tensor in case[2]]
    exact = case[1](*case[2])
    for got, expected in zip(*(x if isinstance(x, tuple) else (x,) for x in (case[0](*single), exact)), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_value(case: Case) -> None:
    inputs = tuple(tensor.clone().requires_grad_() for tensor in case[2])
    assert gradcheck(case[0], inputs)


def test_warm_norms_have_the_gradient_of_batch_normalisation() -> None:
    """Once running statistics are those of the batch, the fused gradient is that of the plain batch-normalised form."""
    x, weight = normal(2, 64, 4), normal(2, 64, 4)
    norm, dice = StreamingNorm(2, 4, affine=True).double(), Dice(4).double()
    for _ in range(8000):
        norm.prepare(x)
        dice.norm.prepare(x[:1])
    with torch.no_grad():
        norm.gain.copy_(normal(2, 1, 4))  # type: ignore[union-attr]
        dice.alpha.copy_(normal(4))
    found = x.clone().requires_grad_()
    y = fused.norm_silu(found, norm.gain, norm.bias, *norm.prepare(x))  # type: ignore[arg-type]
    (y * weight).sum().backward()
    (dice(found[0]) * weight[0]).sum().backward()
    expected = x.clone().requires_grad_()
    u = (expected - expected.mean(1, keepdim=True)) * torch.rsqrt(expected.var(1, keepdim=True, correction=0) + 1e-5)
    (torch.nn.functional.silu(u * norm.gain.detach()) * weight).sum().backward()  # type: ignore[union-attr]
    s = expected[0]
    p = torch.sigmoid((s - s.mean(0)) * torch.rsqrt(s.var(0, correction=0) + 1e-8))
    ((p * s + (1 - p) * dice.alpha.detach() * s) * weight[0]).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_what_is_not_finite_stays_visible() -> None:
    for value in (torch.nan, torch.inf):
        x = torch.full((1, 2, 3), value)
        running = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 3)
        gated = torch.zeros_like(x)
        ones = np.ones((2, 1, 2, 3), np.float32), np.ones((1, 2), np.float32)
        fused_kernels.feature_gate(x.numpy(), *ones, gated.numpy())
        outputs = (
            gated,
            fused.NormSilu.apply(x, torch.ones(1, 1, 3), torch.zeros(1, 1, 3), running, None),
            fused.Dice.apply(x[0], torch.zeros(3), running[:, 0], None),
        )
        assert not any(torch.isfinite(output).any() for output in outputs)


COLUMNS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]), st.booleans()), max_size=30
)


@given(COLUMNS)
def test_distinct_pairs_are_numbered_by_first_occurrence(columns: list[tuple[int, int, bool]]) -> None:
    slots, keys = np.array([c[0] for c in columns], np.int32), np.array([c[1] for c in columns], np.int64)
    mask = np.array([c[2] for c in columns], np.bool_)
    order = list(dict.fromkeys((s, k) for s, k, present in columns if present))
    expected = [order.index((s, k)) if present else len(order) for s, k, present in columns]
    for numbered in (plan._unique, plan._unique_slowly):
        first, places = numbered(slots, keys, mask)
        assert [(slots[i], keys[i]) for i in first] == order
        assert places.tolist() == expected
