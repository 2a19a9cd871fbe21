"""deploy/: the Grafana dashboard asks for metrics that there are, Prometheus for routes."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Match

from common.metrics import METRICS, PREFIX, Kind
from launch.gateway.app import create_app
from launch.gateway.config import GatewayConfig
from tests.common.promql import RATES, BadPromQl, Selector, selectors_of

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dualpath.json").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())

SUFFIXES = ("_bucket", "_sum", "_count")
OF_TARGETS = {"job", "instance"}


def with_suffixes(name: str, kind: Kind) -> Iterator[tuple[str, Kind]]:
    """What Prometheus stores of a metric; of a histogram three counters."""
    if kind is not Kind.HISTOGRAM:
        yield name, kind
        return
    for suffix in SUFFIXES:
        yield name + suffix, Kind.COUNTER


def declared() -> dict[str, tuple[Kind, set[str]]]:
    """Our metrics as they are at the gateway: name -> kind and labels."""
    known = {}
    for metric in METRICS.values():
        labels = {*metric.labels, *OF_TARGETS}
        labels |= {metric.reporter} - {"gateway"}
        for name, kind in with_suffixes(PREFIX + metric.name, metric.kind):
            known[name] = kind, labels | ({"le"} if name.endswith("_bucket") else set())
    return known


def of_sglang() -> dict[str, tuple[Kind, set[str]]]:
    """What the installed SGLang declares. Of its labels only those of the target are used."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.submodule_search_locations is not None
    [folder] = package.submodule_search_locations
    source = Path(folder, "srt", "observability", "metrics_collector.py").read_text()
    known = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id not in ("Counter", "Gauge", "Histogram"):
            continue
        values = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
        for name in [v.value for v in values if isinstance(v, ast.Constant)]:
            for stored, kind in with_suffixes(str(name), Kind(node.func.id.lower())):
                le = {"le"} if stored.endswith("_bucket") else set()
                known[stored] = kind, {*OF_TARGETS, "engine", *le}
    return known


KNOWN = declared() | of_sglang()


def faults_of(expression: str, legend: str = "") -> Iterator[str]:
    """What is wrong with a panel's expression, and with the labels in its legend."""
    try:
        selectors = selectors_of(expression.replace("$__rate_interval", "5m"))
    except BadPromQl as error:
        yield str(error)
        return
    if not selectors:
        yield "no metric"
    for selector in selectors:
        yield from faults_of_selector(selector, set(re.findall(r"{{(\w+)}}", legend)))


def faults_of_selector(selector: Selector, in_legend: set[str]) -> Iterator[str]:
    if selector.metric not in KNOWN:
        yield f"no metric {selector.metric}"
        return
    kind, labels = KNOWN[selector.metric]
    functions = [call.function for call in selector.calls]
    grouped = set().union(*(call.by for call in selector.calls))
    for label in sorted((selector.labels | grouped) - labels):
        yield f"{selector.metric} has no label {label}"
    for label in sorted(in_legend - (labels if selector.keeps is None else selector.keeps)):
        yield f"the legend names {label}, which {selector.metric} has no more"
    is_rate = bool(functions) and functions[-1] in RATES
    if (kind is Kind.COUNTER) != is_rate or selector.has_range != is_rate:
        yield f"{selector.metric} is a {kind.value}: a rate of each counter, and of nothing else"
    if selector.metric.endswith("_bucket") != ("histogram_quantile" in functions):
        yield f"{selector.metric}: a quantile is one of buckets"
    if "histogram_quantile" in functions and "le" not in grouped:
        yield f"{selector.metric}: a quantile needs le"


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_panel_asks_for_what_there_is(panel):
    assert panel["targets"]
    for target in panel["targets"]:
        assert list(faults_of(target["expr"], target["legendFormat"])) == [], target["expr"]


def test_variables_and_numbers_of_the_dashboard():
    numbers = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert max(numbers.values()) == 1
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for variable in variables.values():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            metric, label = match.groups()
            assert list(faults_of(f"sum by ({label}) ({metric})")) == []
            assert variable["query"]["query"] == variable["definition"]
    sources = [panel["datasource"] for panel in panels()]
    sources += [target["datasource"] for panel in panels() for target in panel["targets"]]
    sources += [v["datasource"] for v in variables.values() if "datasource" in v]
    assert all(s == {"type": "prometheus", "uid": "${datasource}"} for s in sources)
    used = re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))
    assert set(used) <= variables.keys() | {"__rate_interval", "__all"}
    for panel in panels():
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))


def test_no_two_panels_are_at_one_place():
    taken = Counter()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            taken.update((x, y) for y in range(at["y"], at["y"] + at["h"]))
    assert max(taken.values()) == 1


@pytest.mark.parametrize(
    ("expression", "legend", "fault"),
    [
        ("rate(dualpath:retry_total[5m])", "", "no metric"),
        ("dualpath:retries_total", "", "counter"),
        ("rate(dualpath:requests_queued[5m])", "", "gauge"),
        ("sum by (agent, disk) (dualpath:agent_plans)", "", "no label disk"),
        ('dualpath:agent_plans{tier="ssd"}', "", "no label tier"),
        ("sum by (agent) (dualpath:agent_plans)", "{{state}}", "legend names state"),
        ("rate(dualpath:queue_time_seconds[5m])", "", "no metric"),
        ("histogram_quantile(0.5, rate(dualpath:queue_time_seconds_bucket[5m]))", "", "needs le"),
        ("rate(dualpath:queue_time_seconds_bucket[5m])", "", "quantile"),
        ("sglang:running_reqs", "", "no metric"),
        ("sum(dualpath:agent_plans", "", "open bracket"),
        ("1 + 1", "", "no metric"),
    ],
)
def test_faults_are_found(expression, legend, fault):
    assert fault in " ".join(faults_of(expression, legend))


# ---- Prometheus's own file --------------------------------------------------------------


def relabelled(job: dict[str, Any], address: str) -> dict[str, str]:
    """A target's labels as Prometheus would make them; ``replace`` is all that is used."""
    labels = {"__address__": address, "__metrics_path__": job.get("metrics_path", "/metrics")}
    for rule in job.get("relabel_configs", ()):
        assert rule.keys() <= {"source_labels", "target_label", "replacement"}
        source = ";".join(labels[name] for name in rule.get("source_labels", ()))
        labels[rule["target_label"]] = rule.get("replacement", "$1").replace("$1", source)
    return labels


def test_prometheus_asks_the_gateway_for_routes_that_it_has():
    app = create_app(GatewayConfig(host="127.0.0.1", port=30000, agents={}, engines=[]))
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert jobs.keys() == {"dualpath", "sglang"}
    for name, job in jobs.items():
        [group] = job["static_configs"]
        for address in group["targets"]:
            labels = relabelled(job, address)
            assert labels["__address__"] == "127.0.0.1:30000"
            assert labels.get("engine") == (address if name == "sglang" else None)
            path = labels["__metrics_path__"]
            scope = {"type": "http", "method": "GET", "path": path}
            assert any(route.matches(scope)[0] is Match.FULL for route in app.router.routes), path
