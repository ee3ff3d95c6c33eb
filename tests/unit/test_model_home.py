import numpy as np
import pytest
import torch

from recsys.model.home import FeatureGate, Home, HomeSpec, Reading
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


class Formula:
    """The paper's formulas for one example, with parts left out as in `HomeSpec.without`."""

    def __init__(self, spec: HomeSpec, w: Weights) -> None:
        self.spec, self.w = spec, w
        self.categories = list(dict.fromkeys(spec.groups))

    def expert(self, level: str, group: int, k: int, x: np.ndarray) -> np.ndarray:
        """Swish(BN(MLP(x * Fea_Gate(x))))."""
        w, name, rank = self.w, level + ".feature_gate", self.spec.feature_gate_rank
        if "feature_gate" not in self.spec.without:
            low = x @ w.arrays[name + ".down"][group]
            choice = softmax(np.array([0.0, low[-1] + w.arrays[name + ".bias"][group, 0, 0]]))
            up = w.arrays[name + ".up"][group]
            gates = [2 * sigmoid(low[part * rank : (part + 1) * rank] @ up[part]) for part in (0, 1)]
            x = x * sum(share * gate for share, gate in zip(choice, gates, strict=True))
        index = group * self.spec.experts + k
        hidden = np.split(w.affine(level + ".experts.first", group, x), self.spec.experts)[k]
        z = w.affine(level + ".experts.rest.0", index, swish(hidden))
        if "norm" not in self.spec.without:
            norm = level + ".experts.norm."
            mean, var, gain, bias = (w.arrays[norm + part][index, 0] for part in ("mean", "var", "gain", "bias"))
            z = gain * (z - mean) / np.sqrt(var + 1e-5) + bias
        return swish(z)

    def mixed(
        self, level: str, output: int, gate_input: np.ndarray, experts: list[list[np.ndarray]], reach: list[int]
    ) -> np.ndarray:
        """Sum(Gate, experts of the groups in reach) + Sum(Self_Gate, experts of the last of them)."""
        k = self.spec.experts
        if "hierarchy" in self.spec.without:
            reach = [*(g for g in range(len(experts)) if g != reach[-1]), reach[-1]]
        logits = self.w.affine(level + ".gate", output, gate_input)
        weights = softmax(np.concatenate([logits[g * k : (g + 1) * k] for g in reach]))
        z = sum(weight * value for weight, value in zip(weights, [e for g in reach for e in experts[g]], strict=True))
        if "self_gate" in self.spec.without:
            return z
        residual = logits[len(experts) * k :]
        residual = sigmoid(residual) if k == 1 else softmax(residual)
        return z + sum(weight * value for weight, value in zip(residual, experts[reach[-1]], strict=True))

    def logits(self, v: np.ndarray) -> list[float]:
        k, groups = range(self.spec.experts), range(1 + len(self.categories))
        first = [[self.expert("meta", g, i, v) for i in k] for g in groups]
        z = [self.mixed("meta", 0, v, first, [*groups[1:], 0])]
        z += [self.mixed("meta", g, v, first, [0, g]) for g in groups[1:]]
        mine = [1 + self.categories.index(name) for name in self.spec.groups]
        inputs = [*z, *(z[c] for c in mine)]
        second = [[self.expert("task", g, i, x) for i in k] for g, x in enumerate(inputs)]
        found = []
        for t, c in enumerate(mine):
            h = self.mixed("task", t, np.concatenate([z[c], z[0]]), second, [0, c, len(groups) + t])
            found.append(self.w.affine("towers.1", t, swish(self.w.affine("towers.0", t, h)))[0])
        return found


@pytest.mark.parametrize("without", [(), ("norm",), ("hierarchy",), ("feature_gate",), ("self_gate",)])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("groups", [("inter", "watch", "inter"), ("only", "only"), ("only",)])
def test_head_equals_the_published_formula(groups: tuple[str, ...], experts: int, without: tuple[str, ...]) -> None:
    spec = HomeSpec(
        width=V,
        groups=groups,
        experts=experts,
        expert_hidden=(5, 4),
        tower_hidden=(3,),
        feature_gate_rank=2,
        without=without,
    )
    home = randomised(Home(spec, seeded(0)))
    x = torch.randn(M, V, generator=seeded(1)).double()
    formula = Formula(spec, Weights(home))
    expected = [formula.logits(v) for v in x.numpy()]
    np.testing.assert_allclose(home(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_untrained_feature_gate_changes_nothing() -> None:
    gate = FeatureGate(3, V, 2, seeded(0))
    x = torch.randn(3, M, V, generator=seeded(1))
    torch.testing.assert_close(gate(x), x, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(gate(x[:1]), x[:1].expand(3, -1, -1), atol=1e-6, rtol=1e-6)


def test_feature_gate_stays_between_zero_and_two() -> None:
    gate = randomised(FeatureGate(3, V, 2, seeded(0)))
    x = 100 * torch.randn(3, M, V, generator=seeded(1)).double()
    factor = gate(x) / x
    assert factor.min() >= 0 and factor.max() <= 2 and factor.std() > 0.1


def readings(home: Home) -> tuple[Reading, Reading]:
    first, second = home.readings(torch.randn(M, V, generator=seeded(1)).to(home.towers[-1].weight), ("t", "u"))  # type: ignore[arg-type]
    return first, second


def test_gates_never_leave_their_hierarchy() -> None:
    meta, task = readings(Home(HomeSpec(width=V, groups=("a", "b"), experts=2), seeded(0)))
    assert meta.experts == ("shared.0", "shared.1", "a.0", "a.1", "b.0", "b.1")
    reached = (task.gate_weights > 0).view(2, 5, 2).all(2)
    assert reached.tolist() == [[True, True, False, True, False], [True, False, True, False, True]]
    for reading in (meta, task):
        torch.testing.assert_close(reading.gate_weights.sum(1), torch.ones(len(reading.outputs)))
    open_to_all = readings(Home(HomeSpec(width=V, groups=("a", "b"), without=("hierarchy",)), seeded(0)))
    assert all((reading.gate_weights > 0).all() for reading in open_to_all)


def test_readings_tell_scale_and_dead_units_of_each_expert() -> None:
    home = Home(HomeSpec(width=V, groups=("a", "b"), expert_hidden=(5, 4)), seeded(0)).eval()
    norm = home.meta.experts.norm
    assert norm is not None and norm.gain is not None and norm.bias is not None
    with torch.no_grad():
        norm.gain[1], norm.bias[1] = 0.0, torch.tensor([-50.0, -50.0, 3.0, 3.0])
    meta, _ = readings(home)
    assert meta.dead.tolist() == [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert meta.scales[1].item() == pytest.approx(3 / (1 + np.exp(-3)) / 2)


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
