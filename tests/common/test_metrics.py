"""The table of metrics, and that the code and the docs keep to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.metrics import METRICS, Kind, help_markdown
from common.samples import Latencies, Sample, UndeclaredMetric, histogram, reported, sample
from tests.test_house import name_of, nodes_of, python_files

DOCS = Path(__file__).parents[2] / "docs"
REPORTED = {metric for metric in METRICS.values() if metric.reporter != "gateway"}


def emissions() -> Iterator[tuple[str, str, ast.Call]]:
    """Where a sample is made, the function that makes it, and the call."""
    for path in python_files("common", "storage", "transfer", "engine", "scheduler", "launch"):
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("sample", "histogram"):
                    yield f"{name_of(path)}:{node.lineno}", node.func.id, node


def names_in(argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.IfExp):
        return names_in(argument.body) + names_in(argument.orelse)
    assert isinstance(argument, ast.Constant) and isinstance(argument.value, str), (
        f"line {argument.lineno}: write the name out"
    )
    return [argument.value]


def test_what_the_code_reports_is_what_the_table_declares():
    found = {name for _, _, call in emissions() for name in names_in(call.args[0])}
    assert found == {metric.name for metric in REPORTED}


def test_labels_and_kinds_are_those_of_the_table():
    for where, function, call in emissions():
        for name in names_in(call.args[0]):
            metric = METRICS[name]
            assert (function == "histogram") == (metric.kind is Kind.HISTOGRAM), where
            labels = [keyword.arg for keyword in call.keywords]
            assert None in labels or labels == list(metric.labels), where


def test_the_names_tell_counters_apart():
    for metric in METRICS.values():
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert metric.help.endswith(".") and metric.unit, metric.name


def test_the_tables_in_the_docs_are_current():
    assert help_markdown() in (DOCS / "operations.md").read_text()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_no_page_names_a_metric_that_is_not_there(page):
    named = {name for name in re.findall(r"dualpath:(\w+)", page.read_text())}
    assert named <= METRICS.keys()


@pytest.mark.parametrize(
    ("make", "name", "value", "labels"),
    [
        (sample, "agent_of_nothing", 1, {}),
        (sample, "agent_plans", 1, {}),
        (sample, "agent_plans", 1, {"status": "waiting"}),
        (sample, "agent_dram_slots", 1, {"state": "used"}),
        (sample, "agent_storage_read_seconds", 1, {"tier": "ssd"}),
        (histogram, "agent_read_queue_seconds", Latencies(), {"tier": "ssd"}),
    ],
)
def test_what_is_not_declared_cannot_be_made(make, name, value, labels):
    with pytest.raises(UndeclaredMetric, match=name):
        make(name, value, **labels)


def test_a_report_goes_out_without_what_is_not_declared(caplog):
    def samples() -> Iterator[Sample]:
        yield sample("agent_dram_slots", 4)
        yield sample("agent_slots_of_a_typing_error", 4)

    for _ in range(2):
        assert reported(samples()) == [Sample("agent_dram_slots", (), 4)]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
