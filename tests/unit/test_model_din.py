import contextlib
from collections.abc import Iterator

import pytest
import torch

from recsys.model import fused, fused_kernels
from recsys.model.din import Activation, MeanPool, TargetAttention
from recsys.model.layers import Dice, seeded

M, R, T, D, B = 150, 3, 6, 8, 4


def build(activation: Activation = "dice", softmax: bool = False) -> TargetAttention:
    """An attention in float64 whose every parameter and statistic is random."""
    module = TargetAttention(D, T, (7, 5), generator=seeded(1), activation=activation, softmax=softmax, gaps=B).double()
    generator = seeded(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return module.eval()


@contextlib.contextmanager
def form(compiled: bool) -> Iterator[None]:
    """Serve with the fused operations, or op by op as before they are compiled."""
    fused.warm_up()
    if not compiled:
        fused_kernels.compiled.clear()
    try:
        yield
    finally:
        fused_kernels.compiled.set()


def inputs(requests: int = R) -> tuple[torch.Tensor, ...]:
    generator = seeded(3)
    candidate = torch.randn(M, D, generator=generator).double()
    history = torch.randn(requests, T, D, generator=generator).double()
    mask = torch.rand(requests, T, generator=generator) < 0.6
    request = torch.randint(requests, (M,), generator=generator)
    return candidate, history, mask, request, torch.randint(B, (requests, T), generator=generator)


def naive(module: TargetAttention, softmax: bool, *tensors: torch.Tensor) -> torch.Tensor:
    """The published form, pair by pair: W1 [c; h; c-h; c*h] with any split of the sums into W_c, W_h and W_d."""
    difference = torch.randn(module.candidate.shape, generator=seeded(9)).double()
    w1 = torch.cat([module.candidate - difference, module.entry + difference, difference, module.product], 1)
    pooled = []
    for c, row in zip(tensors[0], tensors[3], strict=True):
        entries, scores = [], []
        for t in range(T):
            if tensors[2][row, t]:
                h = tensors[1][row, t]
                x = w1 @ torch.cat([c, h, c - h, c * h]) + module.rank_bias[len(entries)]
                assert module.gap_bias is not None
                x = x + module.gap_bias[tensors[4][row, t]]
                for activation, weight, bias in zip(module.activations, module.weights, module.biases, strict=True):
                    if isinstance(activation, Dice):
                        norm = activation.norm
                        p = torch.sigmoid((x - norm.mean[0]) / torch.sqrt(norm.var[0] + 1e-8))
                        x = p * x + (1 - p) * activation.alpha * x
                    else:
                        x = torch.where(x > 0, x, activation.weight * x)
                    x = weight @ x + bias
                entries.append(h)
                scores.append(x)
        if not entries:
            pooled.append(torch.zeros(D).double())
            continue
        weights = torch.cat(scores)
        weights = torch.softmax(weights, 0) if softmax else weights / len(entries) ** 0.5
        pooled.append(weights @ torch.stack(entries))
    return torch.stack(pooled)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "prelu"])
@pytest.mark.parametrize("requests", [1, R])
@pytest.mark.parametrize("compiled", [False, True])
def test_factorised_attention_equals_the_published_form(
    compiled: bool, requests: int, activation: Activation, softmax: bool
) -> None:
    module, tensors = build(activation, softmax), inputs(requests)
    with form(compiled), torch.no_grad():
        torch.testing.assert_close(module(*tensors), naive(module, softmax, *tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_one_request_and_pairs_agree_in_value_and_gradient(training: bool, softmax: bool) -> None:
    candidate, history, mask, request, gaps = inputs(1)
    module = build(softmax=softmax).train(training)
    twin = build(softmax=softmax).train(training)
    padded = [torch.cat([x, torch.zeros_like(x)]) for x in (history, mask, gaps)]
    one, pairs = module(candidate, history, mask, request, gaps), twin(candidate, *padded[:2], request, padded[2])
    torch.testing.assert_close(one, pairs)
    one.square().sum().backward()
    pairs.square().sum().backward()
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("requests", [1, R])
def test_empty_history_gives_zeros_and_finite_gradients(requests: int, softmax: bool) -> None:
    candidate, history, mask, request, gaps = inputs(requests)
    mask[0] = False
    module = build(softmax=softmax).train()
    history.requires_grad_()
    pooled = module(candidate, history, mask, request, gaps)
    assert (pooled[request == 0] == 0).all() and torch.isfinite(pooled).all()
    pooled.sum().backward()
    for tensor in (history, *module.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


def test_padding_content_changes_nothing() -> None:
    candidate, history, mask, request, gaps = inputs()
    module = build().train()
    before = module(candidate, history, mask, request, gaps)
    again = build().train()(candidate, history.masked_fill(~mask.unsqueeze(2), 1e6), mask, request, gaps)
    torch.testing.assert_close(before, again)


def test_no_candidates_and_no_entries_are_legal() -> None:
    module = build()
    _, history, mask, request, gaps = inputs(1)
    assert module(torch.empty(0, D).double(), history, mask, request[:0], gaps).shape == (0, D)
    assert (module(torch.ones(2, D).double(), history[:, :0], mask[:, :0], request[:2], gaps[:, :0]) == 0).all()


def test_too_long_a_history_is_refused() -> None:
    candidate, history, mask, request, gaps = inputs()
    twice = [torch.cat([x, x], 1) for x in (history, torch.ones_like(mask), gaps)]
    with pytest.raises(ValueError, match="cut it to the newest"):
        build()(candidate, *twice[:2], request, twice[2])


def test_without_layers_the_history_is_averaged_entry_by_entry() -> None:
    candidate, history, mask, request, gaps = inputs()
    mask[1] = False
    found = MeanPool()(candidate, history, mask, request, gaps)
    for pooled, row in zip(found, request.tolist(), strict=True):
        entries = [history[row, t] for t in range(T) if mask[row, t]]
        torch.testing.assert_close(pooled, sum(entries, torch.zeros(D).double()) / max(len(entries), 1))
