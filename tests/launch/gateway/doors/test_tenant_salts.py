"""Nobody can tell from the cache what another tenant has sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from common.page_hashes import page_hashes
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.salts import derived_salt, salted
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.timeout(60)]

ALICE = (ApiKey("alice", "key-a1"), ApiKey("alice", "key-a2"))
KEYS = DoorKeys((*ALICE, ApiKey("bob", "key-b")))


async def ask(cluster: StubCluster, key: str, **fields: Any) -> tuple[int, Any, Any]:
    headers = {"authorization": f"Bearer {key}"}
    body = {**GENERATE, **fields}
    async with cluster.http.post("/generate", json=body, headers=headers) as answer:
        return (
            answer.status,
            await answer.json(),
            json.loads(answer.headers.get("x-dualpath-trace", "{}")),
        )


@pytest.mark.asyncio
async def test_a_tenants_blocks_are_hits_for_it_alone() -> None:
    async with cluster_of(keys=KEYS, path_policy="prefill") as cluster:
        own = derived_salt(b"key-a1", "")
        await cluster.announce("node-p", keys_of(PROMPT, own))
        for key in ("key-a1", "key-a2"):
            assert (await ask(cluster, key))[2]["hit_blocks"] == 3
        # Neither without a salt nor with any that bob can think of.
        for fields in ({}, {"cache_salt": ""}, {"cache_salt": own}, {"extra_key": own}):
            _, _, trace = await ask(cluster, "key-b", **fields)
            assert trace["hit_blocks"] == 0 and trace["readers"] == {}
        assert {body["cache_salt"] for body in cluster.decodes[0].bodies[:2]} == {own}
        assert own not in {body["cache_salt"] for body in cluster.decodes[0].bodies[2:]}


@pytest.mark.asyncio
async def test_a_cluster_of_friends_shares_its_cache() -> None:
    settings = DoorSettings(share_cache=True)
    async with cluster_of(keys=KEYS, doors=settings, path_policy="prefill") as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        for key in ("key-a1", "key-b"):
            assert (await ask(cluster, key))[2]["hit_blocks"] == 3


@pytest.mark.asyncio
async def test_a_request_is_its_tenants_to_abort_and_to_name() -> None:
    async with cluster_of(keys=KEYS) as cluster:
        cluster.decodes[0].word_delay_s = 0.5
        sent = asyncio.create_task(ask(cluster, "key-a1", rid="mine", stream=True))
        await cluster.until(lambda: cluster.decodes[0].bodies)
        for key in ("key-b", "key-a2"):
            headers = {"authorization": f"Bearer {key}"}
            async with cluster.http.post(
                "/abort_request", json={"rid": "mine"}, headers=headers
            ) as answer:
                assert answer.status == 200
            assert bool(cluster.decodes[0].aborted) == (key == "key-a2")
        assert (await ask(cluster, "key-b", rid="mine"))[0] == 200, "another tenant's is another"
        sent.cancel()


def test_a_salt_of_ones_own_counts_within_the_tenant() -> None:
    def salt(key: bytes, value: object) -> object:
        return salted({"cache_salt": value}, key)["cache_salt"]

    assert salt(b"a", None) == salt(b"a", "") == salted({}, b"a")["cache_salt"]
    values = [salt(key, value) for key in (b"a", b"b") for value in ("", "x", "y")]
    assert len(set(map(str, values))) == 6
    assert salt(b"a", ["x", None]) == [salt(b"a", "x"), salt(b"a", "")]
    page_hashes([1] * 4, 4, cache_salt=str(values[0]))  # SGLang takes it for a salt
