import pytest
import torch

from recsys.model.layers import MIN_BATCH, Dice, StreamingNorm, seeded


def test_dice_with_tiny_variance_is_prelu() -> None:
    dice = Dice(3).eval()
    with torch.no_grad():
        dice.norm.var.zero_()
        dice.alpha.fill_(0.25)
    x = torch.randn(50, 3, generator=seeded(0))
    x = torch.where(x.abs() < 0.01, 0.5, x)
    torch.testing.assert_close(dice(x), torch.where(x > 0, x, 0.25 * x))


def test_dice_with_alpha_one_is_the_identity() -> None:
    dice = Dice(3)
    with torch.no_grad():
        dice.alpha.fill_(1.0)
    x = torch.randn(50, 3, generator=seeded(0))
    torch.testing.assert_close(dice(x), x)


def test_dice_equals_the_published_formula() -> None:
    dice = Dice(4).double().eval()
    with torch.no_grad():
        dice.norm.mean.copy_(torch.randn(1, 4, generator=seeded(1)))
        dice.norm.var.copy_(torch.rand(1, 4, generator=seeded(2)))
        dice.alpha.copy_(torch.randn(4, generator=seeded(3)))
    s = torch.randn(20, 4, generator=seeded(4)).double()
    p = 1 / (1 + torch.exp(-(s - dice.norm.mean) / torch.sqrt(dice.norm.var + 1e-8)))
    torch.testing.assert_close(dice(s), p * s + (1 - p) * dice.alpha * s)


def test_training_value_is_the_serving_value() -> None:
    norm = StreamingNorm(4, affine=True)
    x = torch.randn(64, 4, generator=seeded(0)) * 3 + 2
    trained = norm.train()(x)
    torch.testing.assert_close(norm.eval()(x), trained)


def test_warm_norm_has_value_and_gradient_of_batch_normalisation() -> None:
    norm = StreamingNorm(2, 3)
    x = (torch.randn(2, 64, 3, generator=seeded(0)) * 2 + 1).requires_grad_()
    weight = torch.randn(2, 64, 3, generator=seeded(1))
    for _ in range(8000):
        norm(x.detach())
    (norm(x) * weight).sum().backward()
    y = x.detach().clone().requires_grad_()
    expected = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, keepdim=True, correction=0) + 1e-5)
    (expected * weight).sum().backward()
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)


def test_running_statistics_find_the_variance_between_constant_batches() -> None:
    norm = StreamingNorm(1)
    generator = seeded(0)
    for _ in range(3000):
        norm((5 + 2 * torch.randn(1, 1, generator=generator)).expand(8, 1))
    assert norm.mean.item() == pytest.approx(5, abs=0.6)
    assert norm.var.sqrt().item() == pytest.approx(2, abs=0.6)


def test_statistics_do_not_depend_on_how_the_rows_are_cut() -> None:
    x = 4 + 3 * torch.randn(64 * 256, 2, generator=seeded(5))
    norms = {size: StreamingNorm(2) for size in (256, 32, 1)}
    for size, norm in norms.items():
        for part in x.split(size):
            norm(part)
    for norm in norms.values():
        torch.testing.assert_close(norm.mean, norms[256].mean, atol=0.2, rtol=0)
        torch.testing.assert_close(norm.var, norms[256].var, atol=0, rtol=0.2)


def test_one_row_trains_and_an_overflow_does_not_poison() -> None:
    norm = StreamingNorm(2)
    x = torch.ones(1, 2, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and (x.grad > 0).all()
    before = norm.mean.clone()
    norm(torch.tensor([[torch.inf, 1.0], [0.0, 1.0]]))
    assert norm.mean[0, 0] == before[0, 0] and norm.mean[0, 1] != before[0, 1]
    norm(torch.empty(0, 2))
    assert MIN_BATCH > 1 and torch.isfinite(norm.var).all()


def test_eval_changes_no_statistic() -> None:
    norm = StreamingNorm(2).eval()
    norm(torch.randn(64, 2, generator=seeded(0)))
    assert norm.rows == 0 and (norm.var == 1).all()
