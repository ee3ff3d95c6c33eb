"""Metric names and what /metrics says."""

from __future__ import annotations

import re

import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from recsys import metrics
from tests.documents import exported

NO_UNIT = {
    "recsys_scoring_compiled",
    "recsys_parameters_shared",
    "recsys_expert_scale",
    "recsys_ready",
    "recsys_breaker_open",
    "recsys_model_held",
    "recsys_trainer_epoch",
    "recsys_parameter_version_step",
    "recsys_parameter_device_info",
}
UNITS = (
    "_total",
    "_seconds",
    "_bytes",
    "_records",
    "_rows",
    "_items",
    "_impressions",
    "_clusters",
    "_ratio",
    "_loss",
    "_entropy",
)


@pytest.mark.parametrize("name", exported())
def test_name_has_our_prefix_and_a_unit(name: str) -> None:
    assert re.fullmatch(r"recsys_[a-z_]+", name)
    assert name in NO_UNIT or name.endswith(UNITS)


@pytest.mark.parametrize("name", exported())
def test_type_follows_from_the_name(name: str) -> None:
    kind = exported()[name]._type
    assert (kind == "counter") == name.endswith("_total")
    assert kind != "histogram" or name.endswith("_seconds")


def test_what_was_counted_is_rendered() -> None:
    def count() -> float:
        families = text_string_to_metric_families(metrics.render().decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(
            sample.value
            for sample in samples
            if sample.name == "recsys_dead_letters_total" and sample.labels == {"topic": "feedback", "reason": "test"}
        )

    before = count()
    metrics.DEAD_LETTERS.labels("feedback", "test").inc(3)
    assert count() == before + 3


def test_every_metric_and_the_process_itself_is_rendered() -> None:
    text = metrics.render().decode()
    for name, metric in exported().items():
        assert f"# TYPE {name} {metric._type}\n" in text
    assert "process_resident_memory_bytes " in text


@pytest.mark.parametrize(
    ("metric", "low", "high"), [(metrics.RECOMMEND_SECONDS, 0.001, 2.0), (metrics.FRESHNESS_SECONDS, 0.005, 60.0)]
)
def test_buckets_span_what_is_promised(metric: MetricWrapperBase, low: float, high: float) -> None:
    bounds = metric._kwargs["buckets"]
    assert (bounds[0], bounds[-1]) == (low, high)
    assert max(after / before for before, after in zip(bounds, bounds[1:], strict=False)) <= 3
