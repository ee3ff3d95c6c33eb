"""What a layout may choose, on every implementation: optimisers, precision, rounding, initial values, the counting filter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recsys.errors import TableFull
from recsys.table.base import Layout, Optimizer, Precision, Segment, SlotPolicy, Table
from recsys.table.cpu import CpuTable
from recsys.table.reference import ReferenceTable
from recsys.table.rows import round_nearest
from recsys.table.warm import warm_up
from tests.contract.test_table import EXTREMES, keyed, pairs, turns
from tests.table_cuda import cuda_table


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


@pytest.fixture(params=[CpuTable, ReferenceTable, cuda_table])
def make(request: pytest.FixtureRequest) -> type[Table]:
    kind: type[Table] = request.param
    return kind


def layout(*segments: Segment, **options: object) -> Layout:
    slots = options.pop("slots", {0: SlotPolicy(), 1: SlotPolicy()})
    return Layout(name="t", segments=segments, slots=slots, capacity=500, seed=3, **options)  # type: ignore[arg-type]


class Definition:
    """Each optimiser in float64, as its paper writes it."""

    def __init__(self, segment: Segment, w: np.ndarray) -> None:
        self.s, self.w, self.t = segment, w.astype(np.float64), 0
        start = segment.initial_accumulator
        width = segment.dim
        self.sum = np.full(1 if segment.optimizer == "rowwise_adagrad" else width, start)
        self.m, self.v, self.z = np.zeros(width), np.zeros(width), np.zeros(width)

    def step(self, g: np.ndarray) -> np.ndarray:
        s, rate = self.s, self.s.learning_rate
        if s.optimizer == "sgd":
            self.w -= rate * g
        elif s.optimizer in ("adagrad", "rowwise_adagrad"):
            self.sum += (g**2).mean() if s.optimizer == "rowwise_adagrad" else g**2
            self.w -= rate * g / (np.sqrt(self.sum) + s.epsilon)
        elif s.optimizer == "adam":
            self.t += 1
            self.m = s.beta1 * self.m + (1 - s.beta1) * g
            self.v = s.beta2 * self.v + (1 - s.beta2) * g**2
            mean, square = self.m / (1 - s.beta1**self.t), self.v / (1 - s.beta2**self.t)
            self.w -= rate * mean / (np.sqrt(square) + s.epsilon)
        else:
            sigma = (np.sqrt(self.sum + g**2) - np.sqrt(self.sum)) / rate
            self.z += g - sigma * self.w
            self.sum += g**2
            pull = (s.beta + np.sqrt(self.sum)) / rate + s.l2
            self.w = np.where(np.abs(self.z) <= s.l1, 0.0, -(self.z - np.sign(self.z) * s.l1) / pull)
        return self.w


SEGMENTS = {
    "sgd": Segment(name="sgd", dim=64, optimizer="sgd", init_scale=0.1),
    "adagrad": Segment(name="adagrad", dim=19, optimizer="adagrad", learning_rate=0.1, init_scale=0.1),
    "rowwise_adagrad": Segment(name="rowwise", dim=32, optimizer="rowwise_adagrad", init_scale=0.1),
    "adam": Segment(name="adam", dim=8, optimizer="adam", learning_rate=0.01, init_scale=0.1),
    "ftrl": Segment(name="ftrl", dim=8, optimizer="ftrl", learning_rate=0.3, l1=0.5, l2=0.01),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("optimizer", SEGMENTS)
def test_an_optimiser_follows_its_definition_over_1000_steps(
    make: type[Table], optimizer: Optimizer, together: bool
) -> None:
    segments = (SEGMENTS["sgd"], SEGMENTS[optimizer]) if together and optimizer != "sgd" else (SEGMENTS[optimizer],)
    table = make(layout(*segments))
    slots, keys = keyed(7, 5, 7)
    start = table.lookup_train(slots, keys, now_ms=0)
    begins = np.cumsum([0, *(s.dim for s in segments)])
    spans = [slice(a, b) for a, b in zip(begins, begins[1:], strict=False)]
    defined = [[Definition(s, start[n, at]) for s, at in zip(segments, spans, strict=True)] for n in (0, 1)]
    rng = np.random.default_rng(4)
    for _ in range(turns(make, 1000)):
        gradients = rng.standard_normal((3, begins[-1])).astype(np.float32)
        table.apply_gradients(slots, keys, gradients, now_ms=0)
        both = (gradients[0].astype(np.float64) + gradients[2]).astype(np.float32), gradients[1]
        values, _ = table.lookup(slots[:2], keys[:2])
        for n in (0, 1):
            for d, at in zip(defined[n], spans, strict=True):
                w = d.step(both[n][at].astype(np.float64))
                assert (np.abs(values[n, at] - w) <= 1e-5 * np.maximum(1, np.abs(w))).all()
    state = table.export(slots[:2], keys[:2]).state
    if optimizer == "ftrl":
        assert (values[0, spans[-1]] == 0).any() or np.abs(defined[0][-1].z).min() > 0.5
    assert np.isfinite(state).all()


@pytest.mark.parametrize("optimizer", ["adam", "ftrl"])
def test_state_of_an_evicted_row_is_gone(make: type[Table], optimizer: Optimizer) -> None:
    table = make(layout(SEGMENTS[optimizer], slots={0: SlotPolicy(expiry_s=10.0)}))
    slots, keys = keyed(1)
    table.lookup_train(slots, keys, now_ms=0)
    fresh = table.export(slots, keys)
    table.apply_gradients(slots, keys, np.ones((1, 8), np.float32), now_ms=0)
    assert (table.export(slots, keys).state != fresh.state).any()
    table.expire(now_ms=50_000)
    table.lookup_train(slots, keys, now_ms=50_000)
    again = table.export(slots, keys)
    assert (again.state == fresh.state).all() and (again.values == fresh.values).all()


def test_layouts_that_cannot_be_are_refused(make: type[Table]) -> None:
    with pytest.raises(ValueError, match="init_scale must be 0"):
        make(layout(Segment(name="f", dim=2, optimizer="ftrl", init_scale=0.1)))
    with pytest.raises(ValueError, match="init_scale must be 0"):
        make(layout(SEGMENTS["ftrl"], slots={0: SlotPolicy(init_scale=0.1)}))
    with pytest.raises(ValueError, match="stochastic"):
        make(layout(SEGMENTS["sgd"], rounding="stochastic"))
    with pytest.raises(ValueError, match="255"):
        make(layout(SEGMENTS["sgd"], slots={0: SlotPolicy(admission=256)}, filter_counters=64))


def test_a_slot_may_have_its_own_initial_values(make: type[Table]) -> None:
    segments = Segment(name="a", dim=3, init_scale=0.1), Segment(name="b", dim=2)
    table = make(layout(*segments, slots={0: SlotPolicy(), 4: SlotPolicy(init_scale=0.5), 9: SlotPolicy(init_scale=0)}))
    values = {slot: np.abs(table.lookup_train(*keyed(*range(150), slot=slot), now_ms=0)) for slot in (0, 4, 9)}
    assert 0.09 < values[0][:, :3].max() <= 0.1 and (values[0][:, 3:] == 0).all()
    assert 0.49 < values[4].max() <= 0.5 and (values[9] == 0).all()
    assert np.abs(table.defaults().values[1]).max() > 0.1 and (table.defaults().values[2] == 0).all()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 16])
def test_half_precision_keeps_the_nearest_value(make: type[Table], precision: Precision, dim: int) -> None:
    segment = Segment(name="a", dim=dim, optimizer="sgd", learning_rate=1.0)
    table = make(layout(segment, precision=precision))
    count = 400 if dim == 16 else 40
    rng = np.random.default_rng(0)
    given = (rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-9, 6, (count, dim))).astype(np.float32)
    given[0, :3] = 3e38, -3e38, 0.0
    slots, keys = keyed(*range(count))
    table.write(slots, keys, given, now_ms=0)
    kept, _ = table.lookup(slots, keys)
    assert (kept == round_nearest(given, precision)).all()
    if precision == "float16":
        with np.errstate(over="ignore"):
            expected = given.astype(np.float16).astype(np.float32)
        assert (kept == np.where(np.isinf(expected), np.sign(given) * 65504, expected)).all()
    else:
        small = np.abs(given) < 1e37
        assert (np.abs(kept - given)[small] <= np.abs(given)[small] * 2**-8).all()
    table.apply_gradients(slots, keys, np.zeros_like(given), now_ms=0)
    assert (table.lookup(slots, keys)[0] == kept).all()
    other = make(table.layout)
    other.restore(table.export(slots, keys))
    assert (other.lookup(slots, keys)[0] == kept).all()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_stochastic_rounding_is_right_on_average_and_the_same_in_a_replay(
    make: type[Table], precision: Precision
) -> None:
    """Of N independent roundings of x between halves lo and hi, the mean is within 5 standard errors of x: a false alarm
    once in 1.7 million comparisons, of which there are 2 x 5 here."""
    segment = Segment(name="a", dim=8, optimizer="sgd", learning_rate=1.0)
    count = 500 if make is not cuda_table else 400
    slots, keys = keyed(*range(count))
    for x in (1.0003, -0.70001, 123.456, 3.3e-6, 6.1e-5):
        seen = []
        for _ in range(2):
            table = make(layout(segment, precision=precision, rounding="stochastic"))
            table.write(slots, keys, np.zeros((count, 8), np.float32), now_ms=0)
            table.apply_gradients(slots, keys, np.full((count, 8), -np.float32(x), np.float32), now_ms=0)
            seen.append(table.lookup(slots, keys)[0])
        assert (seen[0] == seen[1]).all() and (table.export(slots, keys).state[:, -1] == 1).all()
        near = np.unique(seen[0])
        assert len(near) == 2 and near[0] <= np.float32(x) <= near[1]
        share = (np.float64(np.float32(x)) - near[0]) / (float(near[1]) - float(near[0]))
        error = math.sqrt(share * (1 - share) / seen[0].size)
        assert abs((seen[0] == near[1]).mean() - share) < 5 * error + 1e-3  # the draw has 13 to 24 bits


def test_small_steps_add_up_in_half_precision_only_if_rounded_stochastically(make: type[Table]) -> None:
    segment = Segment(name="a", dim=8, optimizer="sgd", learning_rate=1.0)
    step = np.full((20, 8), -1e-4, np.float32)  # bfloat16 at 1 has steps of 0.0078
    ends = []
    for rounding in ("nearest", "stochastic"):
        table = make(layout(segment, precision="bfloat16", rounding=rounding))
        table.write(*keyed(*range(20)), np.ones((20, 8), np.float32), now_ms=0)
        for _ in range(turns(make, 320)):
            table.apply_gradients(*keyed(*range(20)), step, now_ms=0)
        ends.append(table.lookup(*keyed(*range(20)))[0].mean())
    # 160 values; each one's end has a standard deviation below sqrt(320 x .0078 x 1e-4) = .016.
    assert ends[0] == 1 and abs(ends[1] - (1 + turns(make, 320) * 1e-4)) < 5 * 0.016 / math.sqrt(160)


def test_a_default_row_is_rounded_stochastically_too(make: type[Table]) -> None:
    segment = Segment(name="a", dim=8, optimizer="sgd", learning_rate=1.0)
    options = {"precision": "bfloat16", "rounding": "stochastic", "slots": {2: SlotPolicy(admission=9)}}
    table, oracle = make(layout(segment, **options)), ReferenceTable(layout(segment, **options))
    for each in (table, oracle):
        for key in (5, 6):
            each.apply_gradients(*keyed(key, slot=2), np.full((1, 8), 0.1237, np.float32), now_ms=0)
    assert (table.defaults().values == oracle.defaults().values).all() and table.defaults().state[0, -1] == 2


def filtered(counters: int, admission: int = 2, expiry_s: float | None = 10.0) -> Layout:
    slots = {0: SlotPolicy(admission=admission, expiry_s=expiry_s), 1: SlotPolicy(expiry_s=expiry_s)}
    return Layout(
        name="t", segments=(Segment(name="a", dim=2),), slots=slots, capacity=2000, seed=1, filter_counters=counters
    )


@pytest.mark.parametrize("admission", [2, 17, 255])
def test_a_filter_admits_at_the_threshold_at_the_latest(make: type[Table], admission: int) -> None:
    table = make(filtered(4000, admission))
    for start in range(1, admission, 50):
        table.lookup_train(*keyed(*[5] * min(50, admission - start), *EXTREMES[:1]), now_ms=0)
    assert not table.lookup(*keyed(5))[1][0]
    table.lookup_train(*keyed(5), now_ms=0)
    assert table.lookup(*keyed(5))[1][0]
    table.lookup_train(*keyed(77, slot=1), now_ms=0)
    assert table.lookup(*keyed(77, slot=1))[1][0] and len(table.pending().keys) == 0


def test_the_filters_false_admissions_are_as_stated(make: type[Table]) -> None:
    """1,000 keys in 4,000 counters, each once, then 500 more: each of those is admitted with p < (1 - exp(-1.5))⁴ = .364 at
    most; the mean over the call is (1 - exp(-1.25))⁴ = .259, give or take .02 (one standard deviation)."""
    table = make(filtered(4000))
    for start in (0, 500):
        table.lookup_train(*keyed(*range(start, start + 500)), now_ms=0)
    before = len(table)
    table.lookup_train(*keyed(*range(10_000, 10_500)), now_ms=0)
    assert 0.1 < (len(table) - before) / 500 < 0.42
    large = make(filtered(400_000))
    for start in (0, 500, 10_000):
        large.lookup_train(*keyed(*range(start, start + 500)), now_ms=0)
    assert len(large) <= 1


def test_a_filter_survives_a_restart_halves_and_equals_the_reference(make: type[Table]) -> None:
    table, oracle = make(filtered(4000, 4)), ReferenceTable(filtered(4000, 4))
    rng = np.random.default_rng(0)
    for now in range(0, 30_000, 5000):
        keys = rng.integers(0, 60, 80)
        slots = (keys % 2).astype(np.int32)
        for each in (table, oracle):
            each.lookup_train(slots, keys, now)
            each.expire(now)
        assert (table.pending().sketch == oracle.pending().sketch).all() and len(table) == len(oracle)
        assert table.pending().sketch_ms == oracle.pending().sketch_ms
    other = make(filtered(4000, 4))
    other.restore_pending(table.pending())
    other.lookup_train(*keyed(1000, 1000, 1000), now_ms=30_000)
    again = make(filtered(4000, 4))
    again.restore_pending(other.pending())
    again.lookup_train(*keyed(1000), now_ms=30_000)
    assert again.lookup(*keyed(1000))[1][0]
    with pytest.raises(ValueError, match="filter_counters"):
        make(filtered(8000)).restore_pending(table.pending())


def test_a_full_table_counts_nothing_in_its_filter(make: type[Table]) -> None:
    slots = {0: SlotPolicy(admission=2), 1: SlotPolicy()}
    tight = Layout(name="t", segments=(Segment(name="a", dim=2),), slots=slots, capacity=2, filter_counters=400)
    table = make(tight)
    table.lookup_train(*keyed(1, 2, slot=1), now_ms=0)
    before = table.pending().sketch
    with pytest.raises(TableFull):
        table.lookup_train(*pairs((0, 8), (1, 9)), now_ms=0)
    assert (table.pending().sketch == before).all()
