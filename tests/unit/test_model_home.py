import numpy as np
import pytest
import torch

from recsys.model.home import FeatureGate, Home, HomeSpec, Level
from recsys.model.layers import seeded

M, V = 9, 6


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and statistic random, float64, eval."""
    generator = seeded(5)
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        for name, buffer in module.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def swish(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


class Weights:
    """A network's arrays by name."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.arrays = {name: value.numpy() for name, value in module.state_dict().items()}

    def affine(self, name: str, group: int, x: np.ndarray) -> np.ndarray:
        return x @ self.arrays[name + ".weight"][group] + self.arrays[name + ".bias"][group, 0]


def expert(w: Weights, level: str, group: int, k: int, experts: int, x: np.ndarray) -> np.ndarray:
    """Swish(BN(MLP(x * Fea_Gate(x)))) of one expert, for one example."""
    name = level + ".feature_gate"
    choice = softmax(np.array([0.0, w.affine(name + ".choice", group, x)[0]]))
    factor = sum(
        share * 2 * sigmoid(x @ w.arrays[f"{name}.down.{gate}"][group] @ w.arrays[f"{name}.up.{gate}"][group])
        for gate, share in enumerate(choice)
    )
    index = group * experts + k
    hidden = np.split(w.affine(level + ".experts.first", group, x * factor), experts)[k]
    z = w.affine(level + ".experts.rest.0", index, swish(hidden))
    norm = level + ".experts.norm."
    mean, var, gain, bias = (w.arrays[norm + part][index, 0] for part in ("mean", "var", "gain", "bias"))
    return swish(gain * (z - mean) / np.sqrt(var + 1e-5) + bias)


def mixed(
    w: Weights, level: str, output: int, gate_input: np.ndarray, own: list, others: list, num_experts: int
) -> np.ndarray:
    """Sum(Gate, experts in reach) + Sum(Self_Gate, own experts); own and others are (index, value)."""
    logits = w.affine(level + ".gate", output, gate_input)
    weights = softmax(np.array([logits[index] for index, _ in own + others]))
    z = sum(weight * value for weight, (_, value) in zip(weights, own + others, strict=True))
    residual = logits[num_experts:]
    residual = sigmoid(residual) if len(own) == 1 else softmax(residual)
    return z + sum(weight * value for weight, (_, value) in zip(residual, own, strict=True))


def published(spec: HomeSpec, w: Weights, v: np.ndarray) -> list[float]:
    """Logits of one example, by the paper's formulas."""
    categories, k = list(dict.fromkeys(spec.groups)), spec.experts
    groups = ["shared", *categories]
    first = {g: [(i * k + j, expert(w, "meta", i, j, k, v)) for j in range(k)] for i, g in enumerate(groups)}
    total = len(groups) * k
    z = {"shared": mixed(w, "meta", 0, v, first["shared"], [pair for c in categories for pair in first[c]], total)}
    for i, c in enumerate(categories, start=1):
        z[c] = mixed(w, "meta", i, v, first[c], first["shared"], total)
    second = {g: [(i * k + j, expert(w, "task", i, j, k, z[g])) for j in range(k)] for i, g in enumerate(groups)}
    logits = []
    for t, c in enumerate(spec.groups):
        i = len(groups) + t
        own = [(i * k + j, expert(w, "task", i, j, k, z[c])) for j in range(k)]
        gate_input = np.concatenate([z[c], z["shared"]])
        h = mixed(w, "task", t, gate_input, own, second["shared"] + second[c], (len(groups) + len(spec.groups)) * k)
        logits.append(w.affine("towers.1", t, swish(w.affine("towers.0", t, h)))[0])
    return logits


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("groups", [("inter", "watch", "inter"), ("only", "only"), ("only",)])
def test_head_equals_the_published_formula(groups: tuple[str, ...], experts: int) -> None:
    spec = HomeSpec(
        width=V, groups=groups, experts=experts, expert_hidden=(5, 4), tower_hidden=(3,), feature_gate_rank=2
    )
    home = randomised(Home(spec, seeded(0)))
    x = torch.randn(M, V, generator=seeded(1)).double()
    with torch.no_grad():
        logits = home(x).numpy()
    weights = Weights(home)
    np.testing.assert_allclose(logits, [published(spec, weights, v) for v in x.numpy()], rtol=1e-9, atol=1e-9)


def test_untrained_feature_gate_is_exactly_one() -> None:
    gate = FeatureGate(3, V, 2, seeded(0))
    x = torch.randn(3, M, V, generator=seeded(1))
    assert torch.equal(gate(x), x)


def test_feature_gate_stays_between_zero_and_two() -> None:
    gate = randomised(FeatureGate(3, V, 2, seeded(0)))
    x = 100 * torch.randn(3, M, V, generator=seeded(1)).double()
    factor = gate(x) / x
    assert factor.min() >= 0 and factor.max() <= 2 and factor.std() > 0.1


@pytest.mark.parametrize(("experts", "constant"), [(1, False), (2, True)])
def test_self_gate_is_a_sigmoid_with_one_expert_and_a_softmax_with_more(experts: int, constant: bool) -> None:
    level = randomised(Level(HomeSpec(width=V, groups=("a",), experts=experts), V, [[1, 0], [0, 1]], V, seeded(0)))
    assert isinstance(level, Level)
    mix, own = level.gate_weights(torch.randn(2, M, V, generator=seeded(1)).double())
    torch.testing.assert_close(mix.sum(1), torch.ones(2, M).double())
    assert bool((own.sum(1) - 1).abs().max() < 1e-9) == constant


def test_gates_never_leave_their_hierarchy() -> None:
    home = Home(HomeSpec(width=V, groups=("a", "b"), experts=2), seeded(0))
    mix, _ = home.task.gate_weights(torch.randn(2, M, 64, generator=seeded(1)))
    reached = (mix > 0).all(2).view(2, 5, 2).all(2)
    assert reached.tolist() == [[True, True, False, True, False], [True, False, True, False, True]]
    assert (mix[0].view(5, 2, M)[[2, 4]] == 0).all()


def test_every_parameter_learns() -> None:
    home = Home(HomeSpec(width=V, groups=("a", "b"), experts=2, expert_hidden=(5, 4), tower_hidden=(3,)), seeded(0))
    optimizer = torch.optim.Adam(home.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in home.named_parameters()}
    x = torch.randn(40, V, generator=seeded(1))
    for _ in range(5):
        optimizer.zero_grad()
        (home(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
    assert [name for name, value in home.named_parameters() if torch.equal(value, before[name])] == []
