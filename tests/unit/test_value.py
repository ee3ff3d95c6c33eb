"""The value formula: what it computes, and that nothing but arithmetic gets in."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import parse
from recsys.config.formula import formula
from recsys.ranking.value import _FUNCTIONS, Value

A, B = 0.3, 0.7


def value(text: str) -> float:
    return float(formula(text, ("a", "b"))({"a": np.float64(A), "b": np.float64(B)}, _FUNCTIONS))


LEAVES = st.one_of(st.sampled_from([("a", A), ("b", B)]), st.floats(0.1, 9).map(lambda x: (repr(x), x)))


def combined(parts: st.SearchStrategy[tuple[str, float]]) -> st.SearchStrategy[tuple[str, float]]:
    def binary(sign: str, one: tuple[str, float], two: tuple[str, float]) -> tuple[str, float]:
        computed = {"+": one[1] + two[1], "-": one[1] - two[1], "*": one[1] * two[1]}[sign]
        return f"({one[0]} {sign} {two[0]})", computed

    def call(name: str, one: tuple[str, float], two: tuple[str, float]) -> tuple[str, float]:
        return f"{name}({one[0]}, {two[0]})", {"min": min, "max": max}[name](one[1], two[1])

    return st.one_of(
        st.builds(binary, st.sampled_from("+-*"), parts, parts),
        st.builds(call, st.sampled_from(["min", "max"]), parts, parts),
        parts.map(lambda part: (f"-({part[0]})", -part[1])),
    )


@given(st.recursive(LEAVES, combined, max_leaves=12))
def test_a_formula_is_computed_as_it_reads(case: tuple[str, float]) -> None:
    assert value(case[0]) == pytest.approx(case[1], rel=1e-9, abs=1e-9)


def test_precedence_powers_and_functions() -> None:
    assert value("a + b * 2 ** 3") == pytest.approx(A + B * 8)
    assert value("log(a) - exp(-b) / sqrt(4)") == pytest.approx(math.log(A) - math.exp(-B) / 2)


BAD = (
    "__import__('os').system('true')",
    "a.__class__",
    "a if b else 1",
    "[a for a in b]",
    "(lambda: 1)()",
    "f'{a}'",
    "'a' * 9",
    "True",
    "a < b",
    "a and b",
    "log(a, b)",
    "log(x=a)",
    "min(*a)",
    "eval(a)",
    "c",
    "a +",
    "",
    "a; b",
    "a := 1",
    "a\\0",
    "+" * 2000,
)


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        formula(text, ("a", "b"))


def scorer(value: str = "", **task: Any) -> Value:
    tasks = [{"name": "click", "types": ["click"], "weight": 2.0}, {"name": "watch", "types": ["view"], **task}]
    return Value(parse({"tasks": tasks, "ranking": {"value": value}}))


PREDICTIONS = np.array([[0.5, 0.25], [0.0, 1.0]], np.float32)


def test_without_a_formula_it_is_the_weighted_sum() -> None:
    np.testing.assert_allclose(scorer(weight=0.5)(PREDICTIONS), [1.125, 0.5])


def test_expected_values_have_a_name_and_enter_the_weighted_sum() -> None:
    predictions = np.array([[0.5, 0.8, 0.5]], np.float32)
    bucketed = {"buckets": [4, 10], "weight": 0.1}
    expected = 7 * 0.8 + 3 * 0.5
    np.testing.assert_allclose(scorer("click * watch", **bucketed)(predictions), [0.5 * expected], rtol=1e-6)
    np.testing.assert_allclose(scorer(**bucketed)(predictions), [2 * 0.5 + 0.1 * expected], rtol=1e-6)


def test_what_is_not_finite_counts_as_zero_and_constants_are_legal() -> None:
    np.testing.assert_allclose(scorer("1 / click")(PREDICTIONS), [2.0, 0.0])
    np.testing.assert_allclose(scorer("9 ** 9 ** 9")(PREDICTIONS), [0.0, 0.0])
    np.testing.assert_allclose(scorer("1 / 0 + click")(PREDICTIONS), [0.0, 0.0])
