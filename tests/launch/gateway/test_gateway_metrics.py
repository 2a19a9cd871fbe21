"""What agents, engines and the gateway count arrives at ``/metrics`` under its old names."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from common.cluster.membership import JoinRequest, Role
from common.metrics import LATENCY_BUCKETS_S, METRICS, Kind
from common.samples import Latencies, Sample
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of, post
from tests.launch.gateway.stubs import StubCluster, running_cluster

NAMES = Path(__file__).with_name("metric_names.txt").read_text().splitlines()
"""With the names of their labels: dashboards and alerts are built on them."""


def latencies(*seconds: float) -> Latencies:
    found = Latencies()
    for one in seconds:
        found.note(one)
    return found


def every_sample(reporter: str) -> list[Sample]:
    """One of each metric that it reports."""
    return [
        Sample(
            metric.name,
            tuple(f"some-{label}" for label in metric.labels),
            latencies(0.003, 0.02, 99.0) if metric.kind is Kind.HISTOGRAM else 3.0,
        )
        for metric in METRICS.values()
        if metric.reporter == reporter
    ]


async def families(cluster: StubCluster) -> dict[str, Family]:
    async with cluster.http.get("/metrics") as answer:
        return {f.name: f for f in text_string_to_metric_families(await answer.text())}


def names_of(found: dict[str, Family]) -> set[str]:
    return {
        sample.name + (f"{{{','.join(sorted(sample.labels))}}}" if sample.labels else "")
        for family in found.values()
        for sample in family.samples
    }


@pytest.fixture
async def reported():
    """The families at ``/metrics`` when everything has been reported and one request served."""
    async with running_cluster() as cluster:
        for agent in cluster.agents.values():
            agent.samples = every_sample("agent") + [
                Sample("agent_of_another_build", (), 1.0),
                Sample("agent_plans", ("one label", "too many"), 1.0),
                Sample("agent_dram_slots", (), latencies()),
                Sample("agent_storage_read_seconds", ("ssd",), Latencies([1, 2], 3, 4.0)),
            ]
            await agent.push(agent.status())
        for engine in cluster.engines:
            engine.samples = every_sample("engine")
            await engine.push(engine.hello())
        await cluster.announce("node-d", keys_of(PROMPT)[:2])
        cluster.services.registry.join(JoinRequest(Role.READER, "session-r0"))
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        peers = cluster.services.plane.members.peers
        await cluster.until(lambda: all(len(peer.samples()) > 5 for peer in peers()))
        yield await families(cluster)


async def test_every_name_and_label_is_spelled_as_ever(reported):
    made_by_the_library = {name for name in names_of(reported) if "_created" in name}
    assert names_of(reported) - made_by_the_library == set(NAMES)


async def test_every_declared_metric_keeps_its_kind_and_help(reported):
    for metric in METRICS.values():
        family = reported[f"dualpath:{metric.name.removesuffix('_total')}"]
        assert (family.type, family.documentation) == (metric.kind.value, metric.help)


async def test_a_histogram_is_complete_and_cumulative(reported):
    samples = [
        sample
        for sample in reported["dualpath:agent_storage_read_seconds"].samples
        if sample.labels.get("agent") == "node-d"
    ]
    buckets = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert list(buckets) == [f"{bound:g}" for bound in LATENCY_BUCKETS_S] + ["+Inf"]
    assert list(buckets.values()) == sorted(buckets.values())
    assert (buckets["0.0025"], buckets["0.005"], buckets["10"], buckets["+Inf"]) == (0, 1, 2, 3)
    rest = {s.name.rpartition("_")[2]: s.value for s in samples if "le" not in s.labels}
    assert rest == {"count": 3, "sum": pytest.approx(99.023)}


async def test_what_another_build_reports_is_left_out(reported):
    assert "dualpath:agent_of_another_build" not in reported
    of_plans = reported["dualpath:agent_plans"].samples
    assert {sample.labels["state"] for sample in of_plans} == {"some-state"}
