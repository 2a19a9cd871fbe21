"""The dashboard's page, its headers, and what it asks the gateway for."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from common.ids import Incarnation
from common.samples import sample
from launch.gateway.dashboard.counted import counts, grown, tiers
from launch.gateway.dashboard.history import KEPT
from launch.gateway.dashboard.page import FOLDER, PARTS, headers, page
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

KEYS = DoorKeys(api_keys=(ApiKey("alice", "key-a"),), admin_api_keys=(ApiKey("root", "key-r"),))


def test_the_browser_runs_what_stands_in_the_page_and_nothing_else() -> None:
    text, policy = page().decode(), headers()["content-security-policy"]
    inline = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.DOTALL)
    assert len(inline) == len(PARTS)
    for content in inline:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and "trusted-types 'none'" in policy


def test_nothing_comes_from_elsewhere_and_no_name_becomes_markup() -> None:
    assert sorted(PARTS) == sorted(f.name for f in FOLDER.iterdir() if f.suffix in (".css", ".js"))
    text = page().decode().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.search(r"\son\w+=|\sstyle=", text)
    assert "localStorage" not in text and "cookie" not in text


def test_tiers_are_read_from_what_an_agent_reports() -> None:
    found = tiers(
        [
            sample("agent_tier_capacity_bytes", 100, tier="ssd"),
            sample("agent_tier_bytes", 60, tier="ssd"),
            sample("agent_tier_blocks", 3, tier="ssd"),
            sample("agent_hits_total", 7, tier="ssd"),
            sample("agent_hits_total", 0, tier="remote"),
        ]
    )
    assert found == {
        "ssd": {
            "bytes": 60,
            "capacity_bytes": 100,
            "blocks": 3,
            "write_queue_bytes": 0,
            "hits_total": 7,
        }
    }


def test_moved_bytes_are_told_apart_by_their_way() -> None:
    moved = [("write", "eth1", 5), ("write", "lo", 2), ("read", "eth1", 3), ("read", "lo", 1)]
    found = counts(
        sample(
            "agent_moved_bytes_total",
            value,
            **{"class": "low", "operation": operation, "nic": nic, "peer": "host"},
        )
        for operation, nic, value in moved
    )
    assert found == {("bytes", "sent"): 5, ("bytes", "fetched"): 3, ("bytes", "local"): 3}


def test_a_counter_that_begins_anew_counts_from_nothing() -> None:
    before = counts([sample("agent_hits_total", 10, tier="ssd")])
    later = counts([sample("agent_hits_total", 12, tier="ssd")])
    anew = counts([sample("agent_hits_total", 4, tier="ssd")])
    assert grown(later, before) == {("hits", "ssd"): 2}
    assert grown(anew, before) == {("hits", "ssd"): 4}
    assert grown(later, later) == {}


async def get(cluster: StubCluster, path: str, key: str = "") -> tuple[int, str]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with cluster.http.get(path, headers=headers) as answer:
        return answer.status, await answer.text()


@pytest.mark.asyncio
async def test_the_page_is_for_everybody_and_its_data_for_operators() -> None:
    async with cluster_of(keys=KEYS) as cluster:
        async with cluster.http.get("/dashboard") as answer:
            assert answer.status == 200 and answer.content_type == "text/html"
            assert await answer.read() == page()
            assert headers().items() <= {k.lower(): v for k, v in answer.headers.items()}.items()
        for path in ("/admin/history", "/admin/cluster"):
            assert (await get(cluster, path))[0] == 401
            assert (await get(cluster, path, "key-a"))[0] == 401
            assert (await get(cluster, path, "key-r"))[0] == 200
        assert (await get(cluster, "/dashboard/x"))[0] != 200


async def report(cluster: StubCluster, read_bytes: int, incarnation: int = 0) -> None:
    """Have an agent report, and the gateway hear it."""
    stub = cluster.agents["node-d"]
    stub.incarnation = Incarnation(stub.incarnation + incarnation)
    stub.samples = [sample("agent_storage_read_bytes_total", read_bytes, tier="ssd")]
    peer = cluster.services.plane.members.agents["node-d"]
    await stub.push(stub.status())
    await cluster.until(lambda: peer.samples() == stub.samples)


@pytest.mark.asyncio
async def test_points_have_what_was_added_since_the_one_before() -> None:
    async with cluster_of(path_policy="n-way") as cluster:
        await cluster.services.history.close()  # points are noted here, by this test's clock
        history = cluster.services.history
        begun = len(history.view(0)["points"])
        await report(cluster, 100)
        await history.note(10.0, 1_000_000)
        await report(cluster, 160)
        await cluster.announce("node-p", keys_of(PROMPT))
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        await history.note(12.0, 999)  # the clock was set back
        await report(cluster, 5, incarnation=1)
        await history.note(14.0, 1_004_000)
        first, second, third = history.view(0)["points"][begun:]
        assert second["at_ms"] == 1_000_001 and second["seconds"] == 2.0
        assert second["nodes"]["node-d"]["bytes"] == {"ssd_read": 60}
        assert second["requests"] == {"ok": 1} and first["requests"] == {}
        assert second["tokens"] == {"hit": 12, "recomputed": 1}
        assert third["nodes"]["node-d"]["bytes"] == {"ssd_read": 5}
        assert history.view(1_000_001)["points"] == [third]
        for _ in range(KEPT + 5):
            await history.note(16.0, 1_006_000)
        assert len(history.view(0)["points"]) == KEPT
        status, text = await get(cluster, "/admin/history?after_ms=1004000")
        assert status == 200 and text.count("at_ms") == KEPT
        for wrong in ("-1", "x", "9" * 16):
            assert (await get(cluster, f"/admin/history?after_ms={wrong}"))[0] == 400
