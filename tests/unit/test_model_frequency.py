import numpy as np
import pytest

from recsys.model.frequency import Frequency


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_item_in_every_batch_has_probability_one() -> None:
    frequency = Frequency()
    for step in range(1, 50):
        frequency.update(step, keys(7, 7, -(2**63)))
    assert frequency.probability(keys(7, -(2**63))).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("gap", [2, 7, 30])
def test_item_in_every_mth_batch_has_gap_m(gap: int) -> None:
    frequency = Frequency()
    for step in range(1, 10 * gap + 1):
        frequency.update(step, keys(step % gap, 999))
    np.testing.assert_allclose(frequency.probability(np.arange(gap)), 1 / gap)


def test_estimate_follows_a_change_with_the_rate() -> None:
    frequency = Frequency(rate=0.1)
    for step in range(1, 2001):
        if step % 10 == 0:
            frequency.update(step, keys(1))
    for step in range(2001, 2051):
        frequency.update(step, keys(1))
    gap = 1 + 9 * 0.9**50
    assert frequency.probability(keys(1))[0] == pytest.approx(1 / gap)


def test_random_items_are_estimated_without_bias_from_other_keys() -> None:
    frequency, generator = Frequency(), np.random.default_rng(0)
    chance = np.linspace(0.02, 0.9, 40)
    for step in range(1, 6001):
        frequency.update(step, np.flatnonzero(generator.random(40) < chance).astype(np.int64))
    np.testing.assert_allclose(frequency.probability(np.arange(40)), chance, rtol=0.35)
    assert abs(frequency.probability(np.arange(40)).sum() / chance.sum() - 1) < 0.05


def test_unseen_and_once_seen_items_are_rare_but_possible() -> None:
    frequency = Frequency(initial_gap=100)
    assert frequency.probability(keys(5)).tolist() == [0.01]
    frequency.update(400, keys(6))
    assert frequency.probability(keys(5, 6, 5)).tolist() == [1 / 400] * 3


def test_restored_estimator_goes_on_bit_equal() -> None:
    generator = np.random.default_rng(1)
    batches = [generator.integers(-50, 50, 20) for _ in range(60)]
    whole = Frequency()
    for step, batch in enumerate(batches, start=1):
        whole.update(step, batch)
        if step == 30:
            half = Frequency()
            half.restore(whole.state())
        elif step > 30:
            half.update(step, batch)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, half.state()[name])


def test_state_is_a_copy() -> None:
    frequency = Frequency()
    frequency.update(1, keys(1))
    state = frequency.state()
    frequency.update(2, keys(1, 2))
    other = Frequency()
    other.restore(state)
    other.update(9, keys(1))
    assert len(other) == 1 and frequency.probability(keys(1))[0] == 1.0


def test_beyond_capacity_the_longest_unseen_are_forgotten() -> None:
    frequency = Frequency(capacity=10)
    for step in range(1, 12):
        frequency.update(step, keys(step, 1000))
    assert len(frequency) <= 10
    assert frequency.probability(keys(1000))[0] == 1.0
    frequency.update(12, keys(11))
    assert frequency.probability(keys(11))[0] == 1.0


def test_steps_must_rise() -> None:
    frequency = Frequency()
    frequency.update(3, keys(1))
    with pytest.raises(ValueError, match="above the last one, 3"):
        frequency.update(3, keys(1))


def test_what_is_kept_goes_on_as_it_was() -> None:
    whole, part = Frequency(), Frequency()
    for step, keys in enumerate(([1, 2, 3], [2, 4], [1, 5]), start=1):
        whole.update(step, np.array(keys))
        part.update(step, np.array(keys))
    part.keep(np.isin(part.keys(), [2, 5]))
    assert part.keys().tolist() == [2, 5]
    for frequency in (whole, part):
        frequency.update(4, np.array([5, 6]))
    assert part.probability(np.array([2, 5, 6])).tolist() == whole.probability(np.array([2, 5, 6])).tolist()
